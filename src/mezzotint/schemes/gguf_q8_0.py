"""GGUF Q8_0: blocks of 32 signed bytes with a float16 scale."""

import torch
from torch import Tensor

from mezzotint.schemes.gguf_blocks import (
    SMALL,
    block_scheme,
    fields,
    from_floats,
    inverse,
    to_floats,
)

CODE_MAX = 127


def decode_q8_0(blocks: Tensor) -> Tensor:
    """Decode code * scale: uint8 [..., 34] to float32 [..., 32]."""
    scale, codes = fields(blocks, 2, SMALL)
    return codes.contiguous().view(torch.int8).float() * to_floats(scale)


def encode_q8_0(blocks: Tensor) -> Tensor:
    """Encode with scale = amax / 127, ties away from zero: the reverse of `decode_q8_0`."""
    scale = blocks.abs().amax(-1, keepdim=True) / CODE_MAX
    scaled = blocks * inverse(scale)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    codes = (whole + (2 * (magnitude - whole)).floor()) * scaled.sign()
    return torch.cat((from_floats(scale), codes.to(torch.int8).view(torch.uint8)), dim=-1)


SCHEME = block_scheme(
    "Q8_0",
    bits=8,
    group=SMALL,
    block_bytes=34,
    usual_error=0.03,
    scales_at=(0,),
    decode=decode_q8_0,
    encode=encode_q8_0,
)
