"""Every family, built in or from a plugin, is detected, built, named, loaded and run."""

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint.checkpoint import Checkpoint
from mezzotint.families import Family, families, family_by_transformer, family_of
from mezzotint.families.building import build_meta_model, model_of_shapes
from mezzotint.loading import Placement, load, plan
from mezzotint.nn import quant_linears
from mezzotint.schemes import FP8
from support import tiny_pipelines
from support.plugin_packages import install_plugin

PLUGIN = Path(__file__).parents[1] / "support/tiny_family.py"
GROUP, VALUE = "mezzotint.families", "tiny_family:FAMILY"
TEXT_TOKENS = "EXAMPLE_TEXT_TOKENS"
CPU = torch.device("cpu")


@cache
def tiny_transformer(name: str) -> nn.Module:
    """Return a small transformer of a family with random weights."""
    torch.manual_seed(0)
    if name == "tiny":
        from tiny_family import TinyTransformer2DModel

        return TinyTransformer2DModel().eval()
    if name == "wan":
        return tiny_pipelines.wan_transformer().eval()
    return getattr(tiny_pipelines, name)().transformer.eval()


@pytest.fixture(params=["flux1", "flux2", "qwenimage", "wan", "zimage", "tiny"])
def family(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Family]:
    """Each family; `tiny` is installed as a plugin of one file."""
    if request.param == "tiny":
        install_plugin(tmp_path, monkeypatch, GROUP, VALUE, PLUGIN.read_text())
    families.cache_clear()
    found = families()[request.param]
    # Small models have positions for few tokens.
    monkeypatch.setattr(
        sys.modules[found.example_inputs.__module__], TEXT_TOKENS, 32, raising=False
    )
    yield found
    families.cache_clear()


@pytest.fixture
def model(family: Family) -> nn.Module:
    return tiny_transformer(family.name)


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def test_family_is_detected_by_its_tensors(family: Family, model: nn.Module) -> None:
    assert family_of(shapes_of(model.state_dict()), "file") is family
    assert family_by_transformer(type(model).__name__, "file") is family


def test_shapes_give_the_model_on_the_meta_device(family: Family, model: nn.Module) -> None:
    shapes = shapes_of(model.state_dict())
    built = model_of_shapes(family, shapes, {}, "file")
    assert type(built) is type(model)
    assert shapes_of(built.state_dict()) == shapes
    assert all(parameter.device.type == "meta" for parameter in built.parameters())


def test_every_tensor_is_named(family: Family, model: nn.Module) -> None:
    shapes = shapes_of(model.state_dict())
    naming = family.naming(
        {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}
    )
    assert {name: [piece.source for piece in pieces] for name, pieces in naming.items()} == {
        name: [f"model.diffusion_model.{name}"] for name in shapes
    }


def test_quantized_checkpoint_loads_and_runs(
    family: Family, model: nn.Module, tmp_path: Path
) -> None:
    folder = tmp_path / "quantized"
    layers = quantized_checkpoint(model, folder)
    checkpoint = Checkpoint.open(folder)
    loaded = build_meta_model(family.transformer_class, checkpoint.header.config)
    load(plan(checkpoint, loaded), loaded, Placement(CPU), torch.float32)
    assert checkpoint.family is family
    assert set(quant_linears(loaded)) == set(layers)
    torch.manual_seed(1)
    settings = family.sampling({}, model.config).replace(height=64, num_frames=5)
    inputs = family.example_inputs(model.config, settings, 1)
    with torch.no_grad():
        ours, expected = (first_tensor(m.eval()(**inputs)) for m in (loaded, model))
    assert ours.shape == expected.shape
    assert (ours - expected).norm() / expected.norm() < 0.2


def quantized_checkpoint(model: nn.Module, folder: Path) -> list[str]:
    """Save a model as ComfyUI would, the linears of its blocks in FP8; return their names."""
    blocks = [
        module for module in model.modules() if type(module).__name__ in model._repeated_blocks
    ]
    members = {id(module) for block in blocks for module in block.modules()}
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in members
    ]
    tensors = dict(model.state_dict())
    for name in layers:
        parts = FP8.encode(tensors[f"{name}.weight"])
        tensors |= {f"{name}.weight": parts["codes"], f"{name}.weight_scale": parts["weight_scale"]}
    note = {"layers": {name: {"format": "float8_e4m3fn"} for name in layers}}
    folder.mkdir()
    config = json.loads(model.to_json_string())
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        folder / "diffusion_pytorch_model.safetensors",
        {"_quantization_metadata": json.dumps(note)},
    )
    return layers


def first_tensor(output: object) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]  # type: ignore[index]
    return output


def test_recommended_sampling_is_valid(family: Family, model: nn.Module) -> None:
    settings = family.sampling({}, model.config)
    family.latent_grid({}, model.config).check(settings)
    arguments = family.pipeline_arguments(settings, 2)
    assert (arguments["height"], arguments["num_inference_steps"]) == (
        settings.height,
        settings.steps,
    )


def test_published_models_are_the_familys(family: Family) -> None:
    assert family.published
    assert {known.transformer for known in family.published.values()} == {family.transformer_class}


def test_plugins_own_names_are_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, monkeypatch, GROUP, VALUE, PLUGIN.read_text())
    families.cache_clear()
    original = {"first.weight": (64, 16), "net.0.qkv.weight": (192, 64)}
    naming = family_of(original, "file").naming(original)
    families.cache_clear()
    rows = naming["tiny_blocks.0.to_k.weight"][0].rows
    assert rows is not None
    assert rows.tolist() == list(range(64, 128))
