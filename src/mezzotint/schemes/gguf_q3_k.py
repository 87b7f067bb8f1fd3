"""GGUF Q3_K: blocks of 256 codes of 3 bits; 16 groups with a signed scale of 6 bits."""

import torch
from torch import Tensor

from mezzotint.schemes.gguf_blocks import (
    BITS,
    LARGE,
    NIBBLES,
    PAIRS,
    block_scheme,
    fields,
    in_groups,
    signed,
    to_floats,
    unpack,
)

GROUPS, SCALE_OFFSET = 16, 32


def decode_q3_k(blocks: Tensor) -> Tensor:
    """Decode code * scale: uint8 [..., 110] to float32 [..., 256].

    A code is two bits, minus 4 where its bit of the mask is 0. The 16 scales are 8 bytes of low
    nibbles and 4 bytes of two high bits each, minus 32, in units of the block's scale.
    """
    mask, low, groups, scale = fields(blocks, LARGE // 8, LARGE // 4, 12, 2)
    low_scales, high_scales = fields(groups, 8, 4)
    scales = unpack(low_scales, 8, NIBBLES) | unpack(high_scales, 4, PAIRS) << 4
    unit = to_floats(scale) * signed(scales, SCALE_OFFSET)
    minus = (unpack(mask, 32, BITS) ^ 1) << 2
    codes = unpack(low, 32, PAIRS).to(torch.int8) - minus.to(torch.int8)
    return (unit.unsqueeze(-1) * in_groups(codes, GROUPS).float()).flatten(-2)


SCHEME = block_scheme(
    "Q3_K",
    bits=3,
    group=LARGE,
    block_bytes=110,
    usual_error=0.4,
    scales_at=(108,),
    decode=decode_q3_k,
)
