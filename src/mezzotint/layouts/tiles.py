"""NVIDIA's 128x4 blocked order of scale factors.

A matrix [rows, columns] is padded with zeros to multiples of 128 rows and 4 columns and cut into 128 x 4 tiles, stored
tile row by tile row. Inside a tile, row r and column c lie at byte (r % 32) * 16 + (r // 32) * 4 + c.
Source: cuBLAS, "1D block scaling factors layout".
"""

import torch
from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 128, 4


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape that `to_tiles` gives a [rows, columns] matrix."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def to_tiles(scales: Tensor) -> Tensor:
    """Row-major [rows, columns] to tiles, as a 2-D tensor of the padded shape; any dtype."""
    rows, columns = scales.shape
    padded = scales.new_zeros(padded_shape(rows, columns))
    padded[:rows, :columns] = scales
    words = _as_words(padded)
    tiles = words.view(padded.shape[0] // TILE_ROWS, 4, 32, padded.shape[1] // TILE_COLUMNS, -1)
    return tiles.permute(0, 3, 2, 1, 4).reshape(words.shape).view(scales.dtype)


def from_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Tiles back to row-major [rows, columns], padding dropped; inverse of `to_tiles`.

    tiles   2-D, of `padded_shape` or larger: what else it holds is padding too
    """
    height, width = tiles.shape
    words = _as_words(tiles)
    blocks = words.view(height // TILE_ROWS, width // TILE_COLUMNS, 32, 4, -1)
    plain = blocks.permute(0, 3, 2, 1, 4).reshape(words.shape).view(tiles.dtype)
    return plain[:rows, :columns].contiguous()


def _as_words(scales: Tensor) -> Tensor:
    """Bytes taken four at a time, a tile's columns, which no permutation here parts; other dtypes as they are."""
    return scales.contiguous().view(torch.int32) if scales.element_size() == 1 else scales
