"""Define the unpacking of 4-bit codes to INT8; the kernel must match it."""

import torch
from torch import Tensor

from mezzotint.schemes.minifloats import unpack_nibbles
from mezzotint.schemes.w4a8 import integers


def unpack_int8_reference(
    codes: Tensor, block_scale: Tensor | None, codebook: Tensor | None
) -> Tensor:
    """Return the integers that 4-bit codes stand for, int8 [out, in].

    codes         uint8 [out, in/2], low nibble is the even column
    block_scale   float [out, groups] of W4A8; without it, codes are two's complement
    codebook      float32 [16], level of each code; None for code - 8
    """
    if block_scale is None:
        nibbles = unpack_nibbles(codes).to(torch.int8)
        return (nibbles ^ 8) - 8
    return integers(codes, block_scale, codebook).to(torch.int8)
