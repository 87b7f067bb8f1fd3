"""Order of the two 4-bit codes in a byte."""

from torch import Tensor

BLOCK = 2**24
"""Bytes worked on at a time, so that a large matrix needs no third copy."""


def swap_nibbles(codes: Tensor) -> Tensor:
    """Exchange the two nibbles of every byte; uint8 in and out, its own inverse.

    The pair of columns (1.0, 6.0) has codes (2, 7): 0x72 low nibble first, 0x27 high nibble first.
    """
    codes = codes.contiguous()
    swapped = codes << 4
    flat, source = swapped.view(-1), codes.view(-1)
    for start in range(0, flat.numel(), BLOCK):
        flat[start : start + BLOCK] |= source[start : start + BLOCK] >> 4
    return swapped
