"""Order of the two 4-bit codes in a byte."""

import torch
from torch import Tensor


BLOCK = 2**24
"""Bytes worked on at a time, so that a large matrix needs no third copy."""


def swap_nibbles(codes: Tensor) -> Tensor:
    """Exchange the two nibbles of every byte; uint8 in and out, its own inverse.

    The pair of columns (1.0, 6.0) has codes (2, 7): 0x72 low nibble first, 0x27 high nibble first.
    """
    swapped = codes << 4
    for upper, block in zip(swapped.flatten().split(BLOCK), codes.flatten().split(BLOCK), strict=True):
        upper |= block >> 4
    return swapped
