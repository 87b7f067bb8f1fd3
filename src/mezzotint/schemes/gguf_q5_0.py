"""GGUF Q5_0: blocks of 32 codes of 5 bits, minus 16, with a float16 scale of either sign."""

import torch
from torch import Tensor

from mezzotint.schemes.gguf_blocks import (
    BITS,
    NIBBLES,
    SMALL,
    block_scheme,
    extreme,
    fields,
    from_floats,
    inverse,
    pack_high_bits,
    pack_nibble_halves,
    round_half_up,
    signed,
    to_floats,
    unpack,
)

OFFSET, CODE_MAX = 16, 31


def decode_q5_0(blocks: Tensor) -> Tensor:
    """Decode (code - 16) * scale: uint8 [..., 22] to float32 [..., 32]."""
    scale, high, low = fields(blocks, 2, 4, SMALL // 2)
    codes = unpack(low, SMALL // 2, NIBBLES) | unpack(high, 1, BITS) << 4
    return to_floats(scale) * signed(codes, OFFSET)


def encode_q5_0(blocks: Tensor) -> Tensor:
    """Encode so that the largest magnitude has code 0: the reverse of `decode_q5_0`."""
    scale = extreme(blocks) / -OFFSET
    codes = round_half_up(blocks * inverse(scale) + (OFFSET + 0.5), CODE_MAX)
    return torch.cat((from_floats(scale), pack_high_bits(codes), pack_nibble_halves(codes)), dim=-1)


SCHEME = block_scheme(
    "Q5_0",
    bits=5,
    group=SMALL,
    block_bytes=22,
    usual_error=0.12,
    scales_at=(0,),
    decode=decode_q5_0,
    encode=encode_q5_0,
)
