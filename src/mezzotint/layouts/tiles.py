"""NVIDIA's 128x4 blocked order of scale factors.

A matrix [rows, columns] is padded with zeros to multiples of 128 rows and 4 columns. It is cut into
128 x 4 tiles, stored one tile row after another. In a tile, row r and column c are at byte
(r % 32) * 16 + (r // 32) * 4 + c.

Source: https://docs.nvidia.com/cuda/cublas/, "1D block scaling factors layout".
"""

import torch
from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 128, 4


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """Return the shape of `to_tiles` of a [rows, columns] matrix."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def to_tiles(scales: Tensor) -> Tensor:
    """Convert row-major [rows, columns] to tiles, a 2-D tensor of the padded shape; any dtype."""
    rows, columns = scales.shape
    padded = scales.new_zeros(padded_shape(rows, columns))
    padded[:rows, :columns] = scales
    words = _as_words(padded)
    # Rows r, r + 32, r + 64 and r + 96 become adjacent: four words of four scales, 16 bytes.
    tiles = words.view(padded.shape[0] // TILE_ROWS, 4, 32, padded.shape[1] // TILE_COLUMNS, -1)
    return tiles.permute(0, 3, 2, 1, 4).reshape(words.shape).view(scales.dtype)


def from_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Convert tiles to row-major [rows, columns] without padding; the inverse of `to_tiles`.

    tiles   2-D, of `padded_shape` or larger; the rest is padding
    """
    height, width = tiles.shape
    words = _as_words(tiles)
    blocks = words.view(height // TILE_ROWS, width // TILE_COLUMNS, 32, 4, -1)
    plain = blocks.permute(0, 3, 2, 1, 4).reshape(words.shape).view(tiles.dtype)
    return plain[:rows, :columns].contiguous()


def _as_words(scales: Tensor) -> Tensor:
    """View bytes as words of four, the columns of a tile; return other dtypes unchanged.

    The permutations keep these columns together, so words move instead of bytes.
    """
    return scales.contiguous().view(torch.int32) if scales.element_size() == 1 else scales
