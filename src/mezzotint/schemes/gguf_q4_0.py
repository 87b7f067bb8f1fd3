"""GGUF Q4_0: blocks of 32 codes of 4 bits, minus 8, with a float16 scale of either sign."""

import torch
from torch import Tensor

from mezzotint.schemes.gguf_blocks import (
    NIBBLES,
    SMALL,
    block_scheme,
    extreme,
    fields,
    from_floats,
    inverse,
    pack_nibble_halves,
    round_half_up,
    signed,
    to_floats,
    unpack,
)

OFFSET, CODE_MAX = 8, 15


def decode_q4_0(blocks: Tensor) -> Tensor:
    """Decode (code - 8) * scale: uint8 [..., 18] to float32 [..., 32]."""
    scale, codes = fields(blocks, 2, SMALL // 2)
    return to_floats(scale) * signed(unpack(codes, SMALL // 2, NIBBLES), OFFSET)


def encode_q4_0(blocks: Tensor) -> Tensor:
    """Encode so that the largest magnitude has code 0: the reverse of `decode_q4_0`."""
    scale = extreme(blocks) / -OFFSET
    codes = round_half_up(blocks * inverse(scale) + (OFFSET + 0.5), CODE_MAX)
    return torch.cat((from_floats(scale), pack_nibble_halves(codes)), dim=-1)


SCHEME = block_scheme(
    "Q4_0",
    bits=4,
    group=SMALL,
    block_bytes=18,
    usual_error=0.25,
    scales_at=(0,),
    decode=decode_q4_0,
    encode=encode_q4_0,
)
