"""Hadamard rotations: orthogonal mixtures of consecutive input features, which spread outliers.

A file states the kind of matrix and the group size; a layer keeps the signs of the matrix.
"""

import math
from functools import cache

import torch
from torch import Tensor

from mezzotint.errors import Unsupported
from mezzotint.schemes.groups import to_groups

MAX_ROTATION = 4096
"""Largest group of columns that is rotated; published files have 16 to 1024."""


@cache
def regular_hadamard(size: int) -> Tensor:
    """Return the signs of ConvRot's matrix, int8 [size, size]: a Kronecker power of a 4 x 4 one.

    All rows of a regular Hadamard matrix have the same sum, so a constant column of outliers is
    spread evenly, where Sylvester's first row would collect it.

    Raises   Unsupported unless `size` is a power of four
    Source   https://arxiv.org/abs/2512.03673 (ConvRot)
    """
    if size < 4 or size > MAX_ROTATION or size.bit_count() != 1 or size.bit_length() % 2 == 0:
        raise Unsupported(f"a regular Hadamard rotation of {size} columns is not a power of four")
    return _kronecker_power(1 - 2 * torch.eye(4, dtype=torch.int8).flip(1), size)


@cache
def sylvester_hadamard(size: int) -> Tensor:
    """Return the signs of Sylvester's Hadamard matrix, int8 [size, size].

    Raises   Unsupported unless `size` is a power of two
    """
    if size < 2 or size > MAX_ROTATION or size.bit_count() != 1:
        raise Unsupported(f"a Hadamard rotation of {size} columns is not a power of two")
    return _kronecker_power(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), size)


def _kronecker_power(base: Tensor, size: int) -> Tensor:
    matrix = base
    while len(matrix) < size:
        matrix = torch.kron(matrix, base)
    return matrix


def rotate(values: Tensor, signs: Tensor) -> Tensor:
    """Multiply each group of columns by the normalized Hadamard matrix of `signs`.

    Both kinds of matrix are symmetric, so rotating twice gives the values back.

    values    float32 [..., in]; in is a multiple of the group
    signs     int8 [group, group]
    Returns   float32 [..., in]
    """
    matrix = signs.float() / math.sqrt(len(signs))
    # The transposed view holds the same numbers, and has BLAS add them in comfy-kitchen's order:
    # decoded weights are then its own, bit for bit.
    return (to_groups(values, len(signs)) @ matrix.t()).reshape(values.shape)
