"""AWQ W4A16: unsigned 4-bit codes with a scale and an offset for each 64 input columns; the input is not quantized."""

import torch
from torch import Tensor

from mezzotint.schemes.groups import grouped
from mezzotint.schemes.rounding import expand_nibbles
from mezzotint.schemes.scheme import COMMON, HALVES, Part, Parts, Scheme, groups_of

AWQ_GROUP = 64


def decode_awq(parts: Parts) -> Tensor:
    """Real weights of an AWQ matrix: code * block_scale + block_zero, in float32.

    codes         uint8 [out, in/2], values 0..15, low nibble is the even column
    block_scale   bf16 [out, in/64]
    block_zero    bf16 [out, in/64], added; -zero * scale, rounded to bf16
    Returns       float32 [out, in]
    """
    groups = grouped(expand_nibbles(parts["codes"]).float(), AWQ_GROUP)
    scaled = groups * parts["block_scale"].float().unsqueeze(-1)
    return (scaled + parts["block_zero"].float().unsqueeze(-1)).flatten(-2)


AWQ_W4A16 = Scheme(
    name="awq_w4a16",
    title="AWQ W4A16",
    bits=4.5,
    group=AWQ_GROUP,
    parts={
        "codes": Part(
            (torch.uint8,), lambda out, in_: ((out, in_ // 2),), "two unsigned codes a byte", rows=True, columns=True
        ),
        "block_scale": Part(
            HALVES, groups_of(AWQ_GROUP), "one scale per 64 columns", scale=True, rows=True, columns=True
        ),
        "block_zero": Part(HALVES, groups_of(AWQ_GROUP), "one offset per 64 columns", rows=True, columns=True),
    },
    optional=COMMON,
    decode=decode_awq,
)
