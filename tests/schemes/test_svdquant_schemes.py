"""Decoding and input quantization of SVDQuant and AWQ, on examples computed by hand."""

import torch

from mezzotint.schemes import AWQ_W4A16, SVDQUANT_INT4, SVDQUANT_NVFP4

ONE = torch.ones(1, 1)


def packed(codes: list[int]) -> torch.Tensor:
    row = torch.tensor(codes, dtype=torch.uint8)
    return (row[::2] | row[1::2] << 4).unsqueeze(0)


def test_int4_codes_are_twos_complement() -> None:
    parts = {"codes": packed([0, 1, 7, 8, 9, 15] + [0] * 58), "block_scale": 0.5 * ONE}
    assert SVDQUANT_INT4.decode(parts)[0, :6].tolist() == [0.0, 0.5, 3.5, -4.0, -3.5, -0.5]


def test_awq_codes_are_unsigned_with_an_offset() -> None:
    parts = {
        "codes": packed([0, 1, 15] + [0] * 61),
        "block_scale": 0.5 * ONE,
        "block_zero": -3.25 * ONE,
    }
    assert AWQ_W4A16.decode(parts)[0, :3].tolist() == [-3.25, -2.75, 4.25]


def test_nvfp4_scales_multiply() -> None:
    parts = {
        "codes": packed([7, 15] + [0] * 14),
        "block_scale": (2 * ONE).to(torch.float8_e4m3fn),
        "global_scale": torch.tensor([0.5]),
        "channel_scale": torch.tensor([4.0]),
    }
    assert SVDQUANT_NVFP4.decode(parts)[0, :3].tolist() == [24.0, -24.0, 0.0]


def test_int4_inputs_are_signed_unless_the_layer_is_shifted() -> None:
    x = torch.zeros(1, 128)
    x[0, :3], x[0, 64] = torch.tensor([7.0, -3.4, 0.6]), -14.0
    assert SVDQUANT_INT4.quantize_activation is not None
    signed = SVDQUANT_INT4.quantize_activation(x, {})
    assert signed[0, [0, 1, 2, 64]].tolist() == [7.0, -3.0, 1.0, -14.0]
    x = x.abs()
    x[0, 0] = 15.0
    unsigned = SVDQUANT_INT4.quantize_activation(x, {"shift": torch.tensor(0.171875)})
    assert unsigned[0, [0, 1, 2]].tolist() == [15.0, 3.0, 1.0]


def test_int4_input_scales_are_stored_in_bf16() -> None:
    x = torch.zeros(1, 64)
    x[0, 0] = 7 * 1.001
    assert SVDQUANT_INT4.quantize_activation is not None
    assert SVDQUANT_INT4.quantize_activation(x, {})[0, 0] == 7.0


def test_nvfp4_input_codes_come_from_the_scale_before_it_is_rounded() -> None:
    """amax 6.36 has scale 1.06, stored as 1.0: 3.6 / 1.06 rounds to 3, but 3.6 / 1.0 to 4."""
    x = torch.zeros(1, 16)
    x[0, :2] = torch.tensor([6.36, 3.6])
    assert SVDQUANT_NVFP4.quantize_activation is not None
    assert SVDQUANT_NVFP4.quantize_activation(x, {})[0, :2].tolist() == [6.0, 3.0]


def test_inputs_that_are_zero_stay_zero() -> None:
    for scheme in (SVDQUANT_INT4, SVDQUANT_NVFP4):
        assert scheme.quantize_activation is not None
        assert scheme.quantize_activation(torch.zeros(2, 64), {}).eq(0).all()


def test_the_shift_reaches_the_codes_and_not_the_low_rank_branch() -> None:
    random = torch.Generator().manual_seed(3)
    parts = {
        "codes": torch.randint(0, 256, (32, 64), generator=random, dtype=torch.uint8),
        "block_scale": torch.rand(32, 2, generator=random),
        "smooth": 0.5 + torch.rand(128, generator=random),
        "proj_down": torch.randn(16, 128, generator=random),
        "proj_up": torch.randn(32, 16, generator=random),
        "shift": torch.tensor(0.171875),
        "bias": torch.randn(32, generator=random),
    }
    x = torch.randn(4, 128, generator=random)
    y = SVDQUANT_INT4.linear(x, parts, quantize=False) + parts["bias"]
    bias = SVDQUANT_INT4.dequantize_bias(parts)
    assert bias is not None
    torch.testing.assert_close(
        y, x @ SVDQUANT_INT4.dequantize(parts).T + bias, rtol=1e-5, atol=1e-4
    )
    residual = SVDQUANT_INT4.decode(parts) / parts["smooth"]
    torch.testing.assert_close(bias, parts["bias"] + residual.sum(1) * 0.171875)
