"""W4A8: 4-bit codes of an INT8 matrix, with a scale per group of columns and INT8 inputs.

A code is decoded to an integer in [-127, 127], so that INT8 tensor cores can multiply the result.
Source: comfy-kitchen's AsymW4A8Int8Layout
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.schemes.groups import scale_any_groups
from mezzotint.schemes.int8 import INT8_MAX, quantize_activation_int8
from mezzotint.schemes.minifloats import unpack_nibbles
from mezzotint.schemes.scheme import (
    COMMON_PARTS,
    FLOAT32,
    INPUT_SCALE,
    ROTATION,
    Part,
    Parts,
    Scheme,
    Shape,
)

GROUPS = (16, 32, 64, 128, 256, 8, 4)
"""Lengths of a group in comfy-kitchen; the tool's default comes first."""
CODEBOOK_SIZE = 16
MIDDLE = 8
"""Code of zero where there is no codebook."""


def decode_w4a8(parts: Parts) -> Tensor:
    """Dequantize a W4A8 matrix: round(level * block_scale) * channel_scale.

    The level of a code is codebook[code], or code - 8 without a codebook.

    codes           uint8 [out, in/2], values 0..15, low nibble is the even column
    block_scale     float8_e4m3fn or float32 [out, groups]
    channel_scale   float32 [out]
    codebook        float32 [16], optional
    Returns         float32 [out, in]
    """
    return scale_rows(integers(parts["codes"], parts["block_scale"], parts.get("codebook")), parts)


def integers(codes: Tensor, block_scale: Tensor, codebook: Tensor | None) -> Tensor:
    """Return the INT8 matrix that the codes stand for, as float32 [out, in].

    codebook   float32 [16], level of each code; None for code - 8
    """
    unpacked = unpack_nibbles(codes)
    if codebook is None:
        return round_levels(unpacked.float() - MIDDLE, block_scale)
    levels = F.embedding(unpacked.int(), codebook.float()[:, None]).squeeze(-1)
    return round_levels(levels, block_scale)


def round_levels(levels: Tensor, block_scale: Tensor) -> Tensor:
    """Round levels [out, in], times the scale of their group [out, groups], to [-127, 127]."""
    scaled = scale_any_groups(levels, block_scale)
    return scaled.round().clamp(-INT8_MAX, INT8_MAX)


def scale_rows(matrix: Tensor, parts: Parts) -> Tensor:
    """Multiply the rows of a matrix [out, in] by channel_scale."""
    return matrix * parts["channel_scale"].float().reshape(-1, 1)


def any_group(out: int, in_: int) -> tuple[Shape, ...]:
    """Return the shapes of one number per output feature and group of input features."""
    return tuple((out, in_ // group) for group in GROUPS if in_ % group == 0)


BLOCK_SCALE = Part(
    (torch.float8_e4m3fn, torch.uint8, torch.float32),
    any_group,
    "one scale per group of columns",
    scale=True,
    rows=True,
    columns=True,
)
CHANNEL_SCALE = Part(
    FLOAT32, lambda out, _in: ((out,),), "one scale per output row", scale=True, rows=True
)
SCHEME = Scheme(
    name="w4a8",
    title="W4A8",
    bits=4,
    usual_error=0.25,
    keeps_bias=True,
    group=GROUPS[0],
    parts={
        "codes": Part(
            (torch.uint8,),
            lambda out, in_: ((out, in_ // 2),),
            "two codes a byte",
            rows=True,
            columns=True,
        ),
        "block_scale": BLOCK_SCALE,
        "channel_scale": CHANNEL_SCALE,
    },
    optional={
        "codebook": Part(FLOAT32, lambda _out, _in: ((CODEBOOK_SIZE,),), "level of each code"),
        "input_scale": INPUT_SCALE,
        "rotation": ROTATION,
    }
    | COMMON_PARTS,
    decode=decode_w4a8,
    input_max=INT8_MAX,
    quantize_activation=quantize_activation_int8,
    static_scale_part="input_scale",
)
