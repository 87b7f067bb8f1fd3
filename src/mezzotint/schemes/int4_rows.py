"""INT4 weights and inputs, with one scale per row of each: ConvRot's W4A4.

Without the rotation of `mezzotint.schemes.rotation`, four bits per row lose too much.
Source: https://arxiv.org/abs/2512.03673
"""

import torch
from torch import Tensor

from mezzotint.schemes.minifloats import unpack_nibbles
from mezzotint.schemes.scheme import (
    COMMON_PARTS,
    FLOAT32,
    INPUT_SCALE,
    ROTATION,
    Part,
    Parts,
    Scheme,
)

INT4_MAX = 7.0
MIN_AMAX = 1e-10
"""Smallest amax of an input row, so that a row of zeros has a scale."""


def decode_int4_rows(parts: Parts) -> Tensor:
    """Dequantize an INT4 matrix: codes * weight_scale.

    codes          uint8 [out, in/2], two's complement -8..7, low nibble is the even column
    weight_scale   float32 [out] or [out, 1]
    Returns        float32 [out, in]
    """
    nibbles = unpack_nibbles(parts["codes"]).to(torch.int8)
    signed = torch.where(nibbles > INT4_MAX, nibbles - 16, nibbles).float()
    return signed * parts["weight_scale"].float().reshape(-1, 1)


def quantize_activation_int4_rows(x: Tensor, parts: Parts) -> Tensor:
    """Quantize x to [-7, 7] with the static input_scale, or else with amax / 7 of each row.

    Returns   float32 of x's shape, dequantized
    Source    comfy-kitchen's quantize_signed_int4_rowwise
    """
    x = x.float()
    if "input_scale" in parts:
        scale = parts["input_scale"].float().reshape(())
    else:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=MIN_AMAX) / INT4_MAX
    return torch.clamp(torch.round(x / scale), -INT4_MAX, INT4_MAX) * scale


PARTS = {
    "codes": Part(
        (torch.uint8,),
        lambda out, in_: ((out, in_ // 2),),
        "two signed codes a byte",
        rows=True,
        columns=True,
    ),
    "weight_scale": Part(
        FLOAT32,
        lambda out, _in: ((out,), (out, 1)),
        "scale of each row of the weights",
        scale=True,
        rows=True,
    ),
}
SCHEME = Scheme(
    name="int4_rows",
    title="INT4 by row",
    bits=4,
    usual_error=0.3,
    keeps_bias=True,
    parts=PARTS,
    optional={"input_scale": INPUT_SCALE, "rotation": ROTATION} | COMMON_PARTS,
    decode=decode_int4_rows,
    input_max=INT4_MAX,
    quantize_activation=quantize_activation_int4_rows,
    static_scale_part="input_scale",
)
