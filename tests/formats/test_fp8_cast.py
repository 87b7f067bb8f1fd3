"""Weights cast to FP8 without scales, and files that lost their scales."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mezzotint
from mezzotint.builtin import resolve
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import MissingTensor, UnknownFormat, UnreadFormat
from mezzotint.quality.compare import compare
from mezzotint.schemes import FP8
from support.checkpoint_makers import cast
from support.pipeline_cases import Case

WEIGHTS = "diffusion_pytorch_model.safetensors"
E4M3 = torch.float8_e4m3fn


def plain_demo() -> dict[str, Tensor]:
    return load_file(resolve("demo") / "transformer" / WEIGHTS)


def folder_of(tensors: dict[str, Tensor], folder: Path, **config: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    model = json.loads((resolve("demo") / "transformer/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(model | config))
    return folder


def matrices(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, value in tensors.items() if value.ndim == 2]


@pytest.fixture
def demo_cast(tmp_path: Path) -> Path:
    """Return the built-in model with its matrices cast and the rest in BF16."""
    tensors = plain_demo()
    return folder_of(
        tensors | {name: tensors[name].to(E4M3) for name in matrices(tensors)}, tmp_path / "cast"
    )


def without_scales(file: Path) -> dict[str, Tensor]:
    return {name: value for name, value in load_file(file).items() if not name.endswith("_scale")}


def test_the_weights_are_the_codes_themselves_and_inputs_are_left_alone(demo_cast: Path) -> None:
    checkpoint, stored = mezzotint.open(demo_cast), load_file(demo_cast / WEIGHTS)
    assert checkpoint.report.format == "weights cast to FP8, without scales"
    assert "and not 448 as with a scale" in checkpoint.evidence
    assert len(checkpoint.modules) == len(matrices(stored))
    for module in checkpoint.modules:
        assert torch.equal(checkpoint.weight(module), stored[f"{module}.weight"].float())
        (piece,) = checkpoint.read(module)
        assert (piece.scheme, piece.quantizes_activation) == (FP8, False)


def test_compare_passes_matrices_and_names_what_is_too_small_for_fp8(
    demo_cast: Path, tmp_path: Path
) -> None:
    """Values near 0.01 keep hardly one digit in e4m3 without a scale."""
    tensors = {name: value.to(E4M3) for name, value in plain_demo().items()}
    sources = [f"matrices={demo_cast}", f"all={folder_of(tensors, tmp_path / 'whole')}"]
    comparison = compare(
        "demo", sources, tmp_path / "report", steps=4, device="cpu", metrics=["psnr"]
    )
    matrices, whole = comparison.candidates
    assert {matrices.gate.name, whole.gate.name} == {"fp8"}
    assert matrices.reasons == ()
    assert whole.weights is not None
    assert whole.weights.worst is not None
    assert (whole.weights.wrong, whole.weights.worst.module) == (1, "proj_out.bias")


def test_lost_scales_are_an_error_and_never_one(tmp_path: Path) -> None:
    folder = folder_of(without_scales(resolve("demo-fp8") / WEIGHTS), tmp_path / "lost")
    with pytest.raises(
        UnknownFormat, match=r"their largest weights are 448: they lost their scales"
    ):
        Checkpoint.open(folder)


def test_lost_scales_of_a_makers_file_are_named(data: Path, tmp_path: Path) -> None:
    (file,) = (data / "bfl_flux2klein_fp8/checkpoint").glob("*.safetensors")
    save_file(without_scales(file), tmp_path / "a.safetensors")
    with pytest.raises(MissingTensor, match=r"weight_scale is not there"):
        mezzotint.convert(tmp_path / "a.safetensors", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"x.weight_scale": torch.ones(1)},
            "x.weight_scale is there, and cast weights have no scales",
        ),
        ({"x.weight": torch.zeros(4, 4, dtype=torch.uint8)}, "x.weight is torch.uint8"),
        ({"scaled_fp8": torch.zeros(0, dtype=E4M3)}, None),
    ],
    ids=["scale", "dtype", "scaled_fp8"],
)
def test_tensors_and_declarations_that_no_cast_has(
    demo_cast: Path, change: dict[str, Tensor], reason: str | None
) -> None:
    save_file(load_file(demo_cast / WEIGHTS) | change, demo_cast / WEIGHTS)
    if reason is None:
        assert Checkpoint.open(demo_cast).detected.format.name == "comfy"
        return
    with pytest.raises(UnknownFormat, match=reason):
        Checkpoint.open(demo_cast)


def test_a_declared_quantization_is_not_overruled(tmp_path: Path, demo_cast: Path) -> None:
    config = {"quant_method": "other", "bits": 8}
    folder = folder_of(
        load_file(demo_cast / WEIGHTS), tmp_path / "declared", quantization_config=config
    )
    with pytest.raises(
        UnreadFormat, match=r"in the format of 'other' \(config\.json: quant_method other\)"
    ):
        Checkpoint.open(folder)


def test_other_components_are_skipped(tmp_path: Path) -> None:
    tensors = {
        f"model.diffusion_model.{name}": value.to(E4M3) for name, value in plain_demo().items()
    }
    skipped = {
        "text_encoders.t5xxl.a.weight": torch.ones(8, 8).to(E4M3),
        "vae.b.weight": torch.ones(2, 2, 3, 3).to(E4M3),
    }
    save_file(tensors | skipped, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert set(checkpoint.report.ignored) == set(skipped)
    assert {f"{module}.weight" for module in checkpoint.modules} == set(matrices(plain_demo()))


@pytest.mark.parametrize("name", ["flux2", "zimage"])
def test_bf16_holds_every_number_of_it(
    cases: Callable[[str], Case], tmp_path: Path, name: str
) -> None:
    case = cases(name)
    file = cast(case, tmp_path / "made")
    mezzotint.convert(file, tmp_path / "bf16", to="bf16", base=None)
    source, written = Checkpoint.open(file), Checkpoint.open(tmp_path / "bf16")
    assert written.detected.format.name == "plain"
    assert set(written.plain) == {
        *source.plain,
        *(f"{m}.{p}" for m in source.modules for p in source.linear_shapes(m)),
    }
    for module in source.modules:
        assert torch.equal(written.tensor(f"{module}.weight").float(), source.weight(module))
    for tensor in source.plain:
        assert source.is_fp8_cast(tensor)
        assert torch.equal(written.tensor(tensor), source.tensor(tensor))
        assert written.tensor(tensor).dtype is torch.bfloat16
