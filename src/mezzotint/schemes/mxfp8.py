"""MXFP8: e4m3 codes, with a power-of-two scale per 32 columns, for weights and inputs."""

import torch
from torch import Tensor

from mezzotint.schemes.groups import from_groups, group_count, scale_groups, to_groups
from mezzotint.schemes.minifloats import E4M3_MAX, round_e4m3
from mezzotint.schemes.scheme import COMMON_PARTS, Part, Parts, Scheme

MXFP8_GROUP = 32
MIN_EXPONENT = -127
"""Exponent of the smallest e8m0 scale."""


def decode_mxfp8(parts: Parts) -> Tensor:
    """Dequantize an MXFP8 matrix: codes * block_scale.

    codes         float8_e4m3fn [out, in]
    block_scale   float8_e8m0fnu [out, in/32], row-major
    Returns       float32 [out, in]
    Source        OCP Microscaling Formats v1.0
    """
    return scale_groups(parts["codes"].float(), parts["block_scale"].float(), MXFP8_GROUP)


def encode_mxfp8(weights: Tensor) -> dict[str, Tensor]:
    """Quantize a matrix to MXFP8; see `_quantize`.

    weights   [out, in], any float dtype
    Returns   the parts of `decode_mxfp8`
    """
    codes, exponent = _quantize(weights)
    block_scale = (exponent - MIN_EXPONENT).squeeze(-1).to(torch.uint8)
    return {
        "codes": from_groups(codes, weights.shape[-1]),
        "block_scale": block_scale.view(torch.float8_e8m0fnu),
    }


def quantize_activation_mxfp8(x: Tensor, parts: Parts) -> Tensor:
    """Quantize x to MXFP8; see `_quantize`.

    Returns   float32 of x's shape, dequantized
    """
    codes, exponent = _quantize(x)
    return from_groups(codes.float() * _power_of_two(exponent), x.shape[-1])


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x [..., in]; a scale is the smallest power of two not below amax(block) / 448.

    Returns   codes e4m3 [..., in/32, 32]; exponents of the scales, int32 [..., in/32, 1]
    Source    comfy-kitchen's quantize_mxfp8, torchao's ScaleCalculationMode.RCEIL
    """
    blocks = to_groups(x.float(), MXFP8_GROUP)
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True) / E4M3_MAX)
    exponent = torch.where(mantissa > 0.5, exponent, exponent - 1).clamp(min=MIN_EXPONENT)
    exponent = torch.where(mantissa > 0, exponent, MIN_EXPONENT)
    return round_e4m3(blocks / _power_of_two(exponent)), exponent


def _power_of_two(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


SCHEME = Scheme(
    name="mxfp8",
    title="MXFP8",
    bits=8,
    usual_error=0.08,
    keeps_bias=True,
    group=MXFP8_GROUP,
    parts={
        "codes": Part(
            (torch.float8_e4m3fn,), lambda out, in_: ((out, in_),), "e4m3 weights", rows=True
        ),
        "block_scale": Part(
            (torch.float8_e8m0fnu, torch.uint8),
            lambda out, in_: ((out, group_count(in_, MXFP8_GROUP)),),
            "one power of two per 32 columns",
            scale=True,
            rows=True,
        ),
    },
    optional=COMMON_PARTS,
    decode=decode_mxfp8,
    encode=encode_mxfp8,
    quantize_activation=quantize_activation_mxfp8,
)
