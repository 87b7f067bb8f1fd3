"""GGUF Q5_1: blocks of 32 codes of 5 bits with a float16 scale and minimum."""

import torch
from torch import Tensor

from mezzotint.schemes.gguf_blocks import (
    BITS,
    NIBBLES,
    SMALL,
    block_scheme,
    fields,
    from_floats,
    inverse,
    pack_high_bits,
    pack_nibble_halves,
    round_half_up,
    to_floats,
    unpack,
)

CODE_MAX = 31


def decode_q5_1(blocks: Tensor) -> Tensor:
    """Decode code * scale + minimum: uint8 [..., 24] to float32 [..., 32]."""
    scale, minimum, high, low = fields(blocks, 2, 2, 4, SMALL // 2)
    codes = unpack(low, SMALL // 2, NIBBLES) | unpack(high, 1, BITS) << 4
    return to_floats(scale) * codes.float() + to_floats(minimum)


def encode_q5_1(blocks: Tensor) -> Tensor:
    """Encode with scale = (max - min) / 31: the reverse of `decode_q5_1`."""
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / CODE_MAX
    codes = round_half_up((blocks - low) * inverse(scale) + 0.5, CODE_MAX)
    fields = (from_floats(scale), from_floats(low), pack_high_bits(codes))
    return torch.cat((*fields, pack_nibble_halves(codes)), dim=-1)


SCHEME = block_scheme(
    "Q5_1",
    bits=5,
    group=SMALL,
    block_bytes=24,
    usual_error=0.12,
    scales_at=(0, 2),
    decode=decode_q5_1,
    encode=encode_q5_1,
)
