"""GGUF Q6_K: blocks of 256 codes of 6 bits, minus 32; 16 groups with a signed scale of 8 bits."""

import torch
from torch import Tensor

from mezzotint.schemes.gguf_blocks import (
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

GROUPS, OFFSET = 16, 32


def decode_q6_k(blocks: Tensor) -> Tensor:
    """Decode (code - 32) * scale: uint8 [..., 210] to float32 [..., 256]."""
    low, high, groups, scale = fields(blocks, LARGE // 2, LARGE // 4, GROUPS, 2)
    units = to_floats(scale) * groups.contiguous().view(torch.int8).float()
    codes = unpack(low, 64, NIBBLES) | unpack(high, 32, PAIRS) << 4
    return (units.unsqueeze(-1) * in_groups(signed(codes, OFFSET), GROUPS)).flatten(-2)


SCHEME = block_scheme(
    "Q6_K",
    bits=6,
    group=LARGE,
    block_bytes=210,
    usual_error=0.06,
    scales_at=(208,),
    decode=decode_q6_k,
)
