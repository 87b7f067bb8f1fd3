"""GGUF Q4_1: blocks of 32 codes of 4 bits with a float16 scale and minimum."""

import torch
from torch import Tensor

from mezzotint.schemes.gguf_blocks import (
    NIBBLES,
    SMALL,
    block_scheme,
    fields,
    from_floats,
    inverse,
    pack_nibble_halves,
    round_half_up,
    to_floats,
    unpack,
)

CODE_MAX = 15


def decode_q4_1(blocks: Tensor) -> Tensor:
    """Decode code * scale + minimum: uint8 [..., 20] to float32 [..., 32]."""
    scale, minimum, codes = fields(blocks, 2, 2, SMALL // 2)
    return to_floats(scale) * unpack(codes, SMALL // 2, NIBBLES).float() + to_floats(minimum)


def encode_q4_1(blocks: Tensor) -> Tensor:
    """Encode with scale = (max - min) / 15: the reverse of `decode_q4_1`."""
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / CODE_MAX
    codes = round_half_up((blocks - low) * inverse(scale) + 0.5, CODE_MAX)
    return torch.cat((from_floats(scale), from_floats(low), pack_nibble_halves(codes)), dim=-1)


SCHEME = block_scheme(
    "Q4_1",
    bits=4,
    group=SMALL,
    block_bytes=20,
    usual_error=0.25,
    scales_at=(0, 2),
    decode=decode_q4_1,
    encode=encode_q4_1,
)
