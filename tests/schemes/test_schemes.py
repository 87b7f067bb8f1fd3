"""The numbers: code tables, rounding, and agreement with comfy-kitchen's own quantizers."""

import comfy_kitchen
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.errors import BadScale, ShapeMismatch
from mezzotint.layouts import from_tiles
from mezzotint.schemes import FP8, INT8, NVFP4
from mezzotint.schemes.minifloats import E2M1_VALUES, round_e2m1, round_e4m3, unpack_e2m1

MAGNITUDES = E2M1_VALUES[:8]


@pytest.mark.parametrize(
    ("byte", "values"),
    [(0x72, (1.0, 6.0)), (0x27, (6.0, 1.0)), (0xF1, (0.5, -6.0)), (0x80, (0.0, -0.0))],
)
def test_low_nibble_is_the_even_column(byte: int, values: tuple[float, float]) -> None:
    assert unpack_e2m1(torch.tensor([byte], dtype=torch.uint8)).tolist() == list(values)


@given(st.floats(-8, 8, width=32))
def test_e2m1_rounds_to_the_nearest_and_ties_to_the_even_mantissa(x: float) -> None:
    rounded = round_e2m1(torch.tensor([x])).item()
    distances = [abs(abs(x) - m) for m in MAGNITUDES]
    nearest = [code for code, distance in enumerate(distances) if distance == min(distances)]
    best = nearest[0] if len(nearest) == 1 else next(code for code in nearest if code % 2 == 0)
    assert abs(rounded) == MAGNITUDES[best]
    assert rounded == 0 or (rounded > 0) == (x > 0)


@pytest.mark.parametrize(
    ("x", "expected"), [(449.0, 448.0), (1e9, 448.0), (-1e9, -448.0), (0.0009, 0.0)]
)
def test_e4m3_saturates_and_never_overflows(x: float, expected: float) -> None:
    assert round_e4m3(torch.tensor(x)).float().item() == expected


@pytest.mark.parametrize("spread", [1.0, 1e-3, 300.0])
def test_nvfp4_inputs_equal_comfy_kitchen(spread: float) -> None:
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(7)) * spread
    unit = x.abs().amax() / (6 * 448)
    codes, tiles = comfy_kitchen.quantize_nvfp4(x, unit, hi_first=False)
    theirs = unpack_e2m1(codes) * (from_tiles(tiles, 256, 8).float() * unit).repeat_interleave(
        16, 1
    )
    ours = NVFP4.quantize_activation(x, {"input_scale": unit})
    assert torch.equal(ours, theirs)


def test_nvfp4_inputs_too_small_for_a_scale_become_zero() -> None:
    x = torch.full((1, 16), 1e-6)
    assert NVFP4.quantize_activation(x, {"input_scale": torch.tensor(1.0)}).abs().max() == 0


def test_fp8_inputs_saturate_at_the_static_scale() -> None:
    x = torch.tensor([1.0, 1000.0, -1000.0])
    assert FP8.quantize_activation(x, {"input_scale": torch.tensor(0.5)}).tolist() == [
        1.0,
        224.0,
        -224.0,
    ]


def test_int8_weights_are_rounded_to_the_nearest_code_of_their_row() -> None:
    weights = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    weights[1] *= 1e-6
    weights[2] = 0
    encoded = INT8.encode(weights)
    assert encoded["weight_scale"].shape == (64, 1)
    assert encoded["codes"].abs().amax(1).tolist() == [127, 127, 0, *[127] * 61]
    error = (INT8.decode(encoded) - weights).abs()
    assert bool((error <= encoded["weight_scale"] * 0.50001).all())


def test_fp8_rows_may_have_scales_of_their_own() -> None:
    codes = torch.ones(2, 16).to(torch.float8_e4m3fn)
    weights = FP8.dequantize({"codes": codes, "weight_scale": torch.tensor([2.0, 3.0])})
    assert weights[:, 0].tolist() == [2.0, 3.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_scale_that_is_no_positive_number_is_an_error(value: float) -> None:
    with pytest.raises(BadScale, match=r"layer\.weight_scale"):
        FP8.check_values("weight_scale", torch.tensor(value), "layer.weight_scale")


def test_a_part_of_the_wrong_shape_is_an_error_that_says_what_was_expected() -> None:
    with pytest.raises(ShapeMismatch, match=r"has shape \[128, 4\], expected \[128, 8\]"):
        NVFP4.check_part("block_scale", (128, 4), torch.float8_e4m3fn, (128, 128), "x.weight_scale")
