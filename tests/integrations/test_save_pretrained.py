"""Models that diffusers saves: Mezzotint and diffusers read them, or saving raises an error."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import mezzotint
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import Unsupported
from mezzotint.fast.passes.fuse_linears import fuse_linears
from mezzotint.fast.runtime.serial import Serial
from mezzotint.generation.generate import generate
from mezzotint.generation.pipeline import recommended_sampling
from mezzotint.kernels import BF16_ACTIVATIONS
from mezzotint.nn import quant_linears
from support.checkpoint_makers import MAKERS
from support.pipeline_cases import Case

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = recommended_sampling("demo").replace(steps=2, height=64)
FORMS = {
    "flux1": ("modelopt nvfp4_svd", "comfy mxfp8", "bfl nvfp4", "nunchaku int4", "cast"),
    "flux2": ("modelopt fp8",),
    "wan_ti2v": ("modelopt w8a8_sq_per_channel",),
    "zimage": ("row-major",),
    "qwenimage": ("comfy nvfp4",),
}
"""{pipeline: formats}: all schemes, split layers, tiled scales, and all input quantizations."""


def contents(model: nn.Module) -> dict[str, Any]:
    """Return everything that determines a model's results: tensors, and how its layers use them."""
    made: dict[str, Any] = {
        name: (value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).tolist())
        for name, value in model.state_dict().items()
    }
    for name, layer in quant_linears(model).items():
        made[name] = [
            (p.scheme.name, p.quant_weight.quantizes_activation, p.layout) for p in layer.sublayers
        ]
    return made


def demo(name: str = "demo-nvfp4", **given: Any) -> Any:
    return mezzotint.load("demo", transformer=name, device="cpu", **given)


def latents(pipe: Any) -> Tensor:
    return generate(
        pipe, ["a large red circle on a blue background"], sampling=SMALL, check_output=False
    ).latents


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms]
)
def test_what_is_saved_is_read_by_both(
    cases: Callable[[str], Case], tmp_path: Path, name: str, form: str
) -> None:
    case = cases(name)
    model = case.load(transformer=MAKERS[name][form](case, tmp_path / "made")).transformer
    assert model.is_quantized
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert Checkpoint.open(tmp_path / "saved").detected.format.name == "mezzotint"
    ours = case.load(transformer=tmp_path / "saved").transformer
    theirs = type(model).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert contents(ours) == contents(theirs) == contents(model)


def test_a_saved_pipeline_generates_the_same(tmp_path: Path) -> None:
    pipe = demo()
    expected = latents(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(latents(mezzotint.load(tmp_path / "saved", device="cpu")), expected)
    theirs = diffusers.FluxPipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    theirs.set_progress_bar_config(disable=True)
    assert torch.equal(latents(theirs), expected)


def test_what_diffusers_has_loaded_is_saved_too(fp8: Path, tmp_path: Path) -> None:
    model = FluxTransformer2DModel.from_pretrained(fp8, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert contents(again) == contents(model)
    again.save_pretrained(tmp_path / "twice")
    one, other = ((tmp_path / folder / WEIGHTS).read_bytes() for folder in ("saved", "twice"))
    assert one == other


def test_4_bits_that_became_fp8_are_saved_as_fp8(tmp_path: Path) -> None:
    pipe = demo(resident="fp8")
    pipe.transformer.save_pretrained(tmp_path / "saved")
    again = demo(str(tmp_path / "saved"))
    assert {layer.scheme.name for layer in quant_linears(again.transformer).values()} == {"fp8"}
    assert contents(again.transformer) == contents(pipe.transformer)


def test_a_copy_saves_its_own_weights(tmp_path: Path) -> None:
    model = demo().transformer
    other = copy.deepcopy(model)
    other.proj_out.weight.zero_()
    other.save_pretrained(tmp_path / "saved")
    again = demo(str(tmp_path / "saved")).transformer
    assert (again.proj_out.weight == 0).all()
    assert not (model.proj_out.weight == 0).all()


def test_a_layer_that_was_replaced_is_saved_as_what_it_is(tmp_path: Path) -> None:
    model = demo().transformer
    name, layer = next(iter(quant_linears(model).items()))
    plain = nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16).requires_grad_(
        False
    )
    plain.weight.copy_(layer.weight)
    model.set_submodule(name, plain)
    model.save_pretrained(tmp_path / "saved")
    assert contents(demo(str(tmp_path / "saved")).transformer) == contents(model)


def test_unquantized_activations_are_saved_if_the_format_can(tmp_path: Path) -> None:
    model = demo("demo-fp8", activations=BF16_ACTIVATIONS).transformer
    model.save_pretrained(tmp_path / "saved")
    assert contents(demo(str(tmp_path / "saved")).transformer) == contents(model)


def with_an_adapter(model: Any) -> None:
    model.proj_out.lora_A = nn.Linear(4, 4)


def fused(model: Any) -> None:
    assert fuse_linears(model, (("attn.to_q", "attn.to_k", "attn.to_v"),))[0] > 0
    model.forward = Serial(model.forward)


def offloaded(model: Any) -> None:
    model.proj_out.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [(with_an_adapter, "lora_A"), (fused, "speed_up has fused"), (offloaded, "CPU offload")],
)
def test_a_model_that_cannot_be_saved_raises_before_anything_is_written(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    pipe = demo()
    change(pipe.transformer)
    with pytest.raises(Unsupported, match=message) as raised:
        pipe.transformer.save_pretrained(tmp_path / "saved")
    assert f"mezzotint convert {pipe.load_report.path} -o OUTPUT" in raised.value.hint
    assert not (tmp_path / "saved").exists()


def test_unquantized_activations_cannot_be_saved_in_a_format_that_quantizes_them(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases("flux1")
    file = MAKERS["flux1"]["nunchaku int4"](case, tmp_path / "made")
    model = mezzotint.load(
        case.folder, transformer=file, device="cpu", activations=BF16_ACTIVATIONS
    ).transformer
    with pytest.raises(Unsupported, match="activations='bf16'"):
        model.save_pretrained(tmp_path / "saved")


def test_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="safetensors"):
        demo().transformer.save_pretrained(tmp_path / "saved", safe_serialization=False)


def test_a_dequantized_model_is_an_ordinary_one(tmp_path: Path) -> None:
    pipe = demo()
    model = pipe.transformer
    weights = {name: layer.dequantize().bfloat16() for name, layer in quant_linears(model).items()}
    assert model.dequantize() is model
    assert not quant_linears(model)
    assert not model.is_quantized
    for name, weight in weights.items():
        assert type(model.get_submodule(name)) is nn.Linear
        assert torch.equal(model.get_submodule(name).weight, weight)
    model.proj_out.weight.data += 1
    assert torch.isfinite(latents(pipe)).all()
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    plain = FluxTransformer2DModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert contents(plain) == contents(model)
    model.to(torch.float32)


@pytest.mark.parametrize("name", ["flux1", "qwenimage"])
def test_a_shifted_layers_bias_is_dequantized_with_it(
    cases: Callable[[str], Case], tmp_path: Path, name: str
) -> None:
    """SVDQuant INT4's second feed-forward layer adds to its input, which its bias takes back."""
    case = cases(name)
    model = case.load(
        transformer=MAKERS[name]["nunchaku int4"](case, tmp_path / "made")
    ).transformer
    reference: Any = case.reference.transformer
    model.dequantize()
    for key, bias in reference.state_dict().items():
        if key.endswith(".bias"):
            torch.testing.assert_close(
                model.state_dict()[key].float(), bias.float(), rtol=0.05, atol=0.05
            )


def test_a_fused_model_is_not_dequantized() -> None:
    model = demo().transformer
    fused(model)
    with pytest.raises(Unsupported, match="speed_up has fused"):
        model.dequantize()
    assert quant_linears(model)
