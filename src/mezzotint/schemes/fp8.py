"""FP8 (e4m3) weights and inputs, with one scale per matrix or per output row."""

import torch
from torch import Tensor

from mezzotint.schemes.groups import replace_zero_with_one
from mezzotint.schemes.minifloats import E4M3_MAX, round_e4m3
from mezzotint.schemes.scheme import (
    COMMON_PARTS,
    FLOAT32,
    INPUT_SCALE,
    Part,
    Parts,
    Scheme,
    scalar_or_per_row,
)


def decode_fp8(parts: Parts) -> Tensor:
    """Dequantize an FP8 matrix: codes * weight_scale.

    codes          float8_e4m3fn [out, in]
    weight_scale   float32 [], [1], [out] or [out, 1] (one per row)
    Returns        float32 [out, in]
    """
    scale = parts["weight_scale"].float()
    return parts["codes"].float() * (
        scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
    )


def encode_fp8(weights: Tensor, per_row: bool = False) -> dict[str, Tensor]:
    """Quantize a matrix to FP8 with weight_scale = amax / 448, or 1 where all weights are zero.

    weights   [out, in], any float dtype
    per_row   use one scale per row instead of one per matrix
    Returns   the parts of `decode_fp8`
    """
    values = weights.float()
    amax = values.abs().amax(1) if per_row else values.abs().amax()
    scale = replace_zero_with_one(amax / E4M3_MAX)
    return {
        "codes": round_e4m3(values / (scale[:, None] if per_row else scale)),
        "weight_scale": scale,
    }


def quantize_activation_fp8(x: Tensor, parts: Parts) -> Tensor:
    """Quantize x to e4m3 with the static input_scale, or else with amax / 448 of each row.

    Returns   float32 of x's shape, dequantized
    Source    ModelOpt FP8: input_scale = amax / 448
    """
    x = x.float()
    scale = (
        parts["input_scale"].float().reshape(())
        if "input_scale" in parts
        else per_row_activation_scale(x)
    )
    return round_e4m3(x / scale).float() * scale


def per_row_activation_scale(x: Tensor) -> Tensor:
    """Return amax / 448 of each row of x [..., in], 1 for a row of zeros: float32 [..., 1]."""
    return replace_zero_with_one(x.float().abs().amax(-1, keepdim=True) / E4M3_MAX)


SCHEME = Scheme(
    name="fp8",
    title="FP8 (e4m3)",
    bits=8,
    usual_error=0.08,
    keeps_bias=True,
    parts={
        "codes": Part(
            (torch.float8_e4m3fn,),
            lambda out, in_: ((out, in_),),
            "e4m3 weights",
            rows=True,
            columns=True,
        ),
        "weight_scale": Part(
            FLOAT32, scalar_or_per_row, "scale of the weights", scale=True, rows=True
        ),
    },
    optional={"input_scale": INPUT_SCALE} | COMMON_PARTS,
    decode=decode_fp8,
    encode=encode_fp8,
    input_max=E4M3_MAX,
    quantize_activation=quantize_activation_fp8,
    static_scale_part="input_scale",
)
