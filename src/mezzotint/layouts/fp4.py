"""Order of the two 4-bit codes in a byte."""

import torch
from torch import Tensor


def swap_nibbles(codes: Tensor) -> Tensor:
    """Exchange the two nibbles of every byte; uint8 in and out, its own inverse.

    The pair of columns (1.0, 6.0) has codes (2, 7): 0x72 low nibble first, 0x27 high nibble first.
    """
    return torch.bitwise_or(codes << 4, codes >> 4)
