"""Other quantizers on the same matrices: they decode alike, and their differences are counted.

comfy-kitchen and diffusers run here. The outputs of ModelOpt and torchao were made by
make_modelopt.py and make_torchao.py in tests/data/oracles. docs/formats/nvfp4.md gives the reasons
for the differences.
"""

from dataclasses import dataclass
from pathlib import Path

import comfy_kitchen
import pytest
import torch
from diffusers.quantizers.bfl import utils as bfl
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from mezzotint.layouts import from_tiles, to_tiles
from mezzotint.schemes import FP8, INT8, MXFP8, NVFP4
from mezzotint.schemes.minifloats import unpack_e2m1

ORACLES = Path(__file__).parents[1] / "data/oracles"
NAMES = ("midpoints", "below_midpoints", "outlier", "random", "wide", "zeros", "tiny", "huge")
NAMES += ("one_row", "odd_rows", "odd_tiles")


@dataclass(frozen=True)
class Quantized:
    """An NVFP4 matrix that a tool quantized, row-major and low nibble first."""

    codes: Tensor
    block_scale: Tensor

    def differences(self, other: "Quantized") -> tuple[int, int]:
        """Count the block scales and the values of codes that differ; 0 and -0 are equal."""
        scales = self.block_scale.float() != other.block_scale.float()
        values = unpack_e2m1(self.codes) != unpack_e2m1(other.codes)
        return int(scales.sum()), int(values.sum())

    def decoded(self, global_scale: Tensor) -> Tensor:
        parts = {"codes": self.codes, "block_scale": self.block_scale, "global_scale": global_scale}
        return NVFP4.dequantize(parts)


def by_kitchen(matrix: Tensor, global_scale: Tensor) -> Quantized:
    codes, tiles = comfy_kitchen.quantize_nvfp4(matrix, global_scale, pad_16x=True, hi_first=False)
    return Quantized(codes[: len(matrix)], from_tiles(tiles, len(matrix), matrix.shape[1] // 16))


def stored(tool: str, name: str) -> Quantized:
    tensors = load_file(ORACLES / f"{tool}.safetensors")
    return Quantized(tensors[f"{name}.codes"], tensors[f"{name}.block_scale"])


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def matrix(name: str) -> Tensor:
    return load_file(ORACLES / "modelopt_nvfp4.safetensors")[f"{name}.matrix"]


@pytest.fixture
def global_scale(name: str) -> Tensor:
    return load_file(ORACLES / "modelopt_nvfp4.safetensors")[f"{name}.global_scale"]


@pytest.mark.parametrize("tool", ["modelopt_nvfp4", "torchao"])
def test_what_modelopt_and_torchao_decode_we_decode_bit_for_bit(
    tool: str, name: str, global_scale: Tensor
) -> None:
    theirs = load_file(ORACLES / f"{tool}.safetensors")[f"{name}.decoded"]
    assert torch.equal(stored(tool, name).decoded(global_scale), theirs)


def test_what_diffusers_decodes_we_decode_bit_for_bit(matrix: Tensor) -> None:
    codes, block_scale, global_scale = bfl.quantize_nvfp4(matrix)
    theirs = bfl.dequantize_nvfp4(codes, block_scale, global_scale)
    assert torch.equal(Quantized(codes, block_scale).decoded(global_scale), theirs)


def test_what_comfy_kitchen_decodes_we_decode_bit_for_bit(
    matrix: Tensor, global_scale: Tensor
) -> None:
    codes, tiles = comfy_kitchen.quantize_nvfp4(matrix, global_scale, pad_16x=True)
    theirs = comfy_kitchen.dequantize_nvfp4(codes, global_scale, tiles, torch.float32)
    assert torch.equal(
        by_kitchen(matrix, global_scale).decoded(global_scale), theirs[: matrix.shape[0]]
    )


def test_comfy_kitchen_and_diffusers_quantize_alike(matrix: Tensor, global_scale: Tensor) -> None:
    codes, block_scale, _ = bfl.quantize_nvfp4(matrix)
    assert by_kitchen(matrix, global_scale).differences(Quantized(codes, block_scale)) == (0, 0)


MODELOPT = {"outlier": (127, 0), "wide": (56, 117), "zeros": (35, 0)}
TORCHAO = {"midpoints": (0, 768), "outlier": (127, 0), "wide": (72, 221), "zeros": (35, 0)}
"""{matrix: (block scales of 128, values of 2048) that differ from comfy-kitchen}; others: none."""


@pytest.mark.parametrize(("tool", "known"), [("modelopt_nvfp4", MODELOPT), ("torchao", TORCHAO)])
def test_quantizers_differ_at_underflow_and_midpoints_only(
    tool: str, known: dict[str, tuple[int, int]], name: str, matrix: Tensor, global_scale: Tensor
) -> None:
    assert by_kitchen(matrix, global_scale).differences(stored(tool, name)) == known.get(
        name, (0, 0)
    )


@pytest.mark.parametrize("tool", ["modelopt_nvfp4", "torchao"])
def test_where_scales_differ_they_have_underflowed(
    tool: str, name: str, matrix: Tensor, global_scale: Tensor
) -> None:
    """ModelOpt clamps scales to 2^-9, the smallest e4m3; torchao to 2^-6, the smallest normal."""
    ours, theirs = (
        by_kitchen(matrix, global_scale).block_scale.float(),
        stored(tool, name).block_scale.float(),
    )
    differ = ours != theirs
    exact = matrix.reshape(*ours.shape, 16).abs().amax(-1) / 6 / global_scale
    assert bool((exact[differ] < 2**-6).all())
    assert bool((theirs[differ] > ours[differ]).all())


def test_inputs_are_quantized_as_in_comfy_kitchen(matrix: Tensor, global_scale: Tensor) -> None:
    ours = NVFP4.quantize_activation(matrix, {"input_scale": global_scale})
    assert torch.equal(ours, by_kitchen(matrix, global_scale).decoded(global_scale))


def test_our_dynamic_inputs_take_the_scale_that_modelopt_would(
    matrix: Tensor, global_scale: Tensor
) -> None:
    assert torch.equal(
        NVFP4.quantize_activation(matrix, {}),
        NVFP4.quantize_activation(matrix, {"input_scale": global_scale}),
    )


def test_mxfp8_inputs_equal_torchao_and_comfy_kitchen(name: str, matrix: Tensor) -> None:
    torchao = load_file(ORACLES / "torchao.safetensors")
    codes = torchao[f"{name}.mxfp8_codes"].view(torch.float8_e4m3fn)
    scale = torchao[f"{name}.mxfp8_scale"].view(torch.float8_e8m0fnu)
    ours = MXFP8.quantize_activation(matrix, {})
    assert torch.equal(ours, MXFP8.dequantize({"codes": codes, "block_scale": scale}))
    theirs, tiles = comfy_kitchen.quantize_mxfp8(matrix, pad_32x=True)
    assert torch.equal(
        ours, comfy_kitchen.dequantize_mxfp8(theirs, tiles, torch.float32)[: len(matrix)]
    )


def test_mxfp8_weights_are_encoded_as_torchao_encodes_them(name: str, matrix: Tensor) -> None:
    torchao = load_file(ORACLES / "torchao.safetensors")
    encoded = MXFP8.encode(matrix)
    assert torch.equal(encoded["codes"].view(torch.uint8), torchao[f"{name}.mxfp8_codes"])
    scale = torchao[f"{name}.mxfp8_scale"].reshape(encoded["block_scale"].shape)
    assert torch.equal(encoded["block_scale"].view(torch.uint8), scale.view(torch.uint8))


def test_comfy_kitchen_takes_the_smallest_mxfp8_scale_for_zero() -> None:
    """Byte 0 of E8M0 is 2^-127 (OCP MX v1.0), as torchao and ModelOpt have it."""
    codes, scale = (
        torch.tensor([[448.0] * 32]).to(torch.float8_e4m3fn),
        torch.zeros(1, 1, dtype=torch.uint8),
    )
    ours = MXFP8.dequantize({"codes": codes, "block_scale": scale.view(torch.float8_e8m0fnu)})
    assert torch.equal(ours, torch.full((1, 32), 448 * 2.0**-127))
    tiles = to_tiles(scale).view(torch.float8_e8m0fnu)
    theirs = comfy_kitchen.dequantize_mxfp8(codes.expand(32, -1).contiguous(), tiles, torch.float32)
    assert not bool(theirs.any())


def test_fp8_rows_equal_diffusers(matrix: Tensor) -> None:
    codes, scale = bfl.quantize_fp8r(matrix)
    assert torch.equal(
        FP8.dequantize({"codes": codes, "weight_scale": scale}), bfl.dequantize_fp8r(codes, scale)
    )


def test_dynamic_int8_inputs_equal_comfy_kitchen(name: str, matrix: Tensor) -> None:
    """comfy-kitchen's smallest scale is 1e-30; ours has no minimum."""
    codes, scale = comfy_kitchen.quantize_int8_rowwise(matrix)
    if name == "tiny":
        assert bool((scale == 1e-30).all())
        return
    theirs = codes.float() * scale.reshape(-1, 1)
    ours = INT8.quantize_activation(matrix, {})
    step = matrix.abs().amax(-1, keepdim=True) / 127
    assert bool(((ours - theirs).abs() <= step * 1e-4).float().mean() > 0.999)


@settings(max_examples=40)
@given(st.integers(1, 70), st.integers(1, 9), st.floats(1e-6, 1e6), st.integers(0, 2**31))
def test_nvfp4_of_any_size_decodes_as_comfy_kitchen_does(
    rows: int, pairs: int, size: float, seed: int
) -> None:
    columns = 2 * pairs
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    scale = matrix.abs().amax() / 2688
    codes, tiles = comfy_kitchen.quantize_nvfp4(matrix, scale, pad_16x=True, hi_first=False)
    theirs = comfy_kitchen.dequantize_nvfp4(codes, scale, tiles, torch.float32, hi_first=False)[
        :rows, :columns
    ]
    read = Quantized(codes[:rows, :pairs], from_tiles(tiles, rows, -(-columns // 16)))
    assert torch.equal(read.decoded(scale), theirs)


@settings(max_examples=40)
@given(st.integers(1, 70), st.integers(1, 80), st.floats(1e-6, 1e6), st.integers(0, 2**31))
def test_fp8_of_any_size_decodes_as_comfy_kitchen_does(
    rows: int, columns: int, size: float, seed: int
) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    scale = matrix.abs().amax() / 448
    codes = comfy_kitchen.quantize_per_tensor_fp8(matrix, scale, torch.float8_e4m3fn)
    theirs = comfy_kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32)
    assert torch.equal(FP8.dequantize({"codes": codes, "weight_scale": scale}), theirs)
