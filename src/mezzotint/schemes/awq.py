"""AWQ W4A16: unsigned 4-bit codes, with a scale and an offset per 64 input columns.

The input is not quantized. Source: Nunchaku's modulation layers (awq_gemv_awq), which store
block_zero as -zero * scale.
"""

import torch
from torch import Tensor

from mezzotint.schemes.groups import replace_zero_with_one, to_groups
from mezzotint.schemes.minifloats import pack_nibbles, unpack_nibbles
from mezzotint.schemes.scheme import COMMON_PARTS, HALF_DTYPES, Part, Parts, Scheme, per_group

AWQ_GROUP = 64
CODE_MAX = 15


def decode_awq(parts: Parts) -> Tensor:
    """Dequantize an AWQ matrix: code * block_scale + block_zero.

    codes         uint8 [out, in/2], values 0..15, low nibble is the even column
    block_scale   bf16 [out, in/64]
    block_zero    bf16 [out, in/64]
    Returns       float32 [out, in]
    """
    groups = to_groups(unpack_nibbles(parts["codes"]).float(), AWQ_GROUP)
    scaled = groups * parts["block_scale"].float().unsqueeze(-1)
    return (scaled + parts["block_zero"].float().unsqueeze(-1)).flatten(-2)


def encode_awq(weights: Tensor) -> dict[str, Tensor]:
    """Quantize a matrix with block_scale = (max - min) / 15 and block_zero = min of each group.

    weights   [out, in], any float dtype
    Returns   the parts of `decode_awq`; scales and offsets in BF16
    """
    groups = to_groups(weights.float(), AWQ_GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale, zero = replace_zero_with_one((high - low) / CODE_MAX).bfloat16(), low.bfloat16()
    codes = torch.round((groups - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).clamp(
        0, CODE_MAX
    )
    return {
        "codes": pack_nibbles(codes.flatten(-2).to(torch.uint8)),
        "block_scale": scale,
        "block_zero": zero,
    }


SCHEME = Scheme(
    name="awq_w4a16",
    title="AWQ W4A16",
    bits=4,
    usual_error=0.25,
    group=AWQ_GROUP,
    parts={
        "codes": Part(
            (torch.uint8,),
            lambda out, in_: ((out, in_ // 2),),
            "two unsigned codes a byte",
            rows=True,
            columns=True,
        ),
        "block_scale": Part(
            HALF_DTYPES,
            per_group(AWQ_GROUP),
            "one scale per 64 columns",
            scale=True,
            rows=True,
            columns=True,
        ),
        "block_zero": Part(
            HALF_DTYPES, per_group(AWQ_GROUP), "one offset per 64 columns", rows=True, columns=True
        ),
    },
    optional=COMMON_PARTS,
    decode=decode_awq,
    encode=encode_awq,
)
