"""How our kernels divide a matrix that they dequantize: a thread decodes runs of eight weights."""

RUN = 8
"""Consecutive weights that a thread decodes together; 16 bytes of BF16 are its longest store."""
TILE, WARPS = 512, 4
"""Runs and warps of a program."""


def programs(runs: int) -> tuple[int]:
    """Return the grid of programs for this number of runs."""
    return (-(-runs // TILE),)
