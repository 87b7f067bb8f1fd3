"""From files to a model: golden weights, golden outputs, and every tensor accounted for."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

import mezzotint  # noqa: F401  (lets diffusers read ModelOpt exports)
from mezzotint.errors import (
    BadScale,
    MezzotintError,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
)
from mezzotint.nn import quant_linears
from support.checkpoint_edits import load_flux, rewrite, run_flux

CASES = {
    "modelopt_flux1_fp8/checkpoint/hf": "modelopt_flux1_fp8",
    "modelopt_flux1_nvfp4/checkpoint": "modelopt_flux1_nvfp4",
    "modelopt_flux1_nvfp4_comfyfile/checkpoint": "modelopt_flux1_nvfp4",
}
LAYER = "transformer_blocks.0.attn.to_q"


def by_diffusers(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)


def golden_pairs() -> list[tuple[str, str, str]]:
    """(checkpoint, case with the expected values, loader)"""
    pairs = [(path, case, "mezzotint") for path, case in CASES.items()]
    return pairs + [
        (path, case, "diffusers") for path, case in CASES.items() if "comfyfile" not in path
    ]


@pytest.mark.parametrize(("path", "case", "loader"), golden_pairs())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoded_weights_equal_the_golden_ones(
    data: Path, path: str, case: str, loader: str, dtype: torch.dtype
) -> None:
    model = (
        load_flux(data / path, dtype) if loader == "mezzotint" else by_diffusers(data / path, dtype)
    )
    expected = load_file(data / case / "expected.safetensors")
    layers = quant_linears(model)
    assert {f"{name}.dequantized" for name in layers} == {
        key for key in expected if key.endswith(".dequantized")
    }
    for name, layer in layers.items():
        weights = layer.dequantize()
        rows = expected.get(f"{name}.rows")
        assert torch.equal(
            weights if rows is None else weights[rows], expected[f"{name}.dequantized"]
        ), name
        assert all(part.dtype == torch.float32 for part in layer.buffers() if part.ndim == 0), (
            "scales stay float32"
        )


@pytest.mark.parametrize("case", ["modelopt_flux1_fp8", "modelopt_flux1_nvfp4"])
def test_float32_forward_equals_the_golden_one(data: Path, case: str) -> None:
    folder = data / case / ("checkpoint/hf" if case.endswith("fp8") else "checkpoint")
    inputs = load_file(data / "base/flux1_inputs.safetensors")
    expected = load_file(data / case / "outputs.safetensors")["dequantized_weights_fp32"]
    output = run_flux(load_flux(folder, torch.float32, activations="bf16"), inputs, torch.float32)
    assert torch.linalg.norm(output - expected) <= 1e-5 * torch.linalg.norm(expected)


def test_plain_weights_are_bit_identical_to_diffusers(data: Path) -> None:
    ours = load_flux(data / "base/flux1")
    theirs = FluxTransformer2DModel.from_pretrained(data / "base/flux1", torch_dtype=torch.bfloat16)
    inputs = load_file(data / "base/flux1_inputs.safetensors")
    assert torch.equal(
        run_flux(ours, inputs, torch.bfloat16), run_flux(theirs, inputs, torch.bfloat16)
    )


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        (
            "broken_missing_weight_scale",
            MissingTensor,
            r"single_transformer_blocks\.0\.attn\.to_q\.weight_scale is not there",
        ),
        (
            "broken_missing_input_scale",
            MissingTensor,
            r"single_transformer_blocks\.0\.norm\.linear\.input_scale is not there",
        ),
        (
            "broken_nan_scale",
            BadScale,
            r"attn\.to_q\.weight_scale holds a value that is not finite",
        ),
        (
            "broken_wrong_shape_scale",
            ShapeMismatch,
            r"attn\.to_v\.weight_scale has shape \[32, 1\], expected \[32, 2\]",
        ),
    ],
)
@pytest.mark.parametrize(
    "load",
    [load_flux, lambda folder: by_diffusers(folder, torch.bfloat16)],
    ids=["ours", "diffusers"],
)
def test_damaged_exports_get_their_diagnosis(
    data: Path, case: str, error: type, message: str, load
) -> None:
    with pytest.raises(error, match=message):
        load(data / case / "checkpoint")


def test_a_missing_input_scale_may_be_done_without_on_request(data: Path) -> None:
    model = load_flux(data / "broken_missing_input_scale/checkpoint", activations="bf16")
    assert not any("input_scale" in name for name, _ in model.named_buffers())


@pytest.mark.parametrize(
    "suffix", [".weight_scale", ".weight_scale_2", ".input_scale", ".weight", ".bias"]
)
def test_any_tensor_that_is_taken_away_is_missed(nvfp4: Path, suffix: str) -> None:
    rewrite(nvfp4, lambda tensors: tensors.pop(LAYER + suffix))
    with pytest.raises(MezzotintError, match=LAYER.replace(".", r"\.")):
        load_flux(nvfp4)


def test_a_tensor_that_belongs_nowhere_is_an_error(nvfp4: Path) -> None:
    rewrite(nvfp4, lambda tensors: tensors.update({"stray": torch.zeros(1)}))
    with pytest.raises(UnexpectedTensor, match="stray is left over"):
        load_flux(nvfp4)


def test_a_scale_beside_an_unquantized_weight_is_an_error(fp8: Path) -> None:
    rewrite(
        fp8,
        lambda tensors: tensors.update(
            {f"{LAYER}.weight": torch.zeros(128, 128, dtype=torch.bfloat16)}
        ),
    )
    with pytest.raises(UnexpectedTensor, match=r"to_q\.(input|weight)_scale"):
        load_flux(fp8)
