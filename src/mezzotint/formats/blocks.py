"""Linears of 8-bit codes with a scale for each block of rows and columns.

A block's scale is repeated for its rows, so that the schemes see groups of columns. Blocks at the
edges of the matrix may be short.
"""

from functools import partial

import torch
from torch import Tensor

from mezzotint.errors import ShapeMismatch, UnreadFormat
from mezzotint.formats.header import Header
from mezzotint.formats.repacked import RepackedLinear, scales_of_blocks, stored
from mezzotint.schemes import FP8_GROUPS, INT_GROUPS, Parts, Shape
from mezzotint.schemes.scheme import FLOAT_DTYPES, FP8_DTYPES
from mezzotint.tensor import PLAIN

Block = tuple[int, int]
"""Rows and columns that share a scale."""
CODES = (*FP8_DTYPES, torch.int8)
OFFSET = 0x80
"""The highest bit: to flip it adds 128 to a signed code, modulo 256."""


def linear_in_blocks(
    header: Header,
    module: str,
    scale: str,
    block: Block,
    zero: str | None = None,
) -> RepackedLinear:
    """Return a layer whose weight is FP8 or INT8 codes; its input is not quantized.

    scale   name of the scales: one per block, [ceil(out/rows), ceil(in/columns)], maybe with a
            last axis of length 1
    zero    name of the zero points, int8, or None
    Raises  ShapeMismatch unless the weight is a matrix
    """
    shape = matrix_shape(header, module)
    weight = header.tensors[f"{module}.weight"]
    count = block_count(shape, block)
    shapes = _scale_shapes(count)
    tensors = {
        "weight": stored((weight.storage_dtype,), (shape,), "8-bit codes"),
        "scale": stored(FLOAT_DTYPES, shapes, "scale of each block", scale=True),
        "zero": stored((torch.int8,), shapes, "zero point of each block"),
    }
    keys = {"weight": weight.name, "scale": scale} | ({} if zero is None else {"zero": zero})
    if f"{module}.bias" in header.tensors:
        keys["bias"] = f"{module}.bias"
    return RepackedLinear(
        module,
        INT_GROUPS[8] if weight.dtype is torch.int8 else FP8_GROUPS,
        PLAIN,
        shape,
        keys,
        tensors=tensors,
        repack=partial(_repack, block=block, count=count, shape=shape),
    )


def matrix_shape(header: Header, module: str) -> tuple[int, int]:
    """Return the shape of a layer's codes. Raises ShapeMismatch unless they are a matrix."""
    info = header.tensors[f"{module}.weight"]
    if len(info.shape) != 2 or 0 in info.shape:
        raise ShapeMismatch(
            f"{info.file}: {info.name} has shape {list(info.shape)}, expected a matrix of codes"
        )
    return info.shape[0], info.shape[1]


def has_block_scales(header: Header, module: str, scale: str) -> bool:
    """Return whether a weight of 8-bit codes has scales in the shape of a grid of blocks.

    A grid of [out, 1] is none: each row has its scale.
    """
    weight, info = header.tensors.get(f"{module}.weight"), header.tensors.get(scale)
    if weight is None or info is None or weight.dtype not in CODES or len(weight.shape) != 2:
        return False
    count = info.shape[:-1] if len(info.shape) == 3 and info.shape[-1] == 1 else info.shape
    if info.dtype not in FLOAT_DTYPES or len(count) != 2:
        return False
    return count[1] > 1 or len(info.shape) == 3 or 0 < count[0] < weight.shape[0]


def block_count(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """Return how many blocks cover the rows and the columns."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def infer_block(header: Header, module: str, scale: str) -> Block:
    """Return the block that the number of scales shows.

    With a scale for each row, a row has equal groups. Otherwise the sides of a block are powers of
    two as far as possible, because the last block may be short.

    Raises  UnreadFormat if no block gives this number of scales
    """
    shape = matrix_shape(header, module)
    info = header.tensors.get(scale)
    count = (*(() if info is None else info.shape), 1, 1)[:2]
    if count[0] == shape[0]:
        block = (1, _equal_side(shape[1], count[1]))
    else:
        block = (_side(shape[0], count[0]), _side(shape[1], count[1]))
    if 0 in block:
        raise UnreadFormat(
            f"{header.path}: {scale} has shape {list(count)}, and no size of blocks gives a weight "
            f"of {list(shape)} as many scales",
            "restore the config.json that came with these weights.",
        )
    return block


def _side(size: int, count: int) -> int:
    """Return the side of `count` blocks that cover `size`, 0 if there is none."""
    if not 0 < count <= size:
        return 0
    power = 1 << (-(-size // count) - 1).bit_length()
    return power if -(-size // power) == count else _equal_side(size, count)


def _equal_side(size: int, count: int) -> int:
    return size // count if count and size % count == 0 else 0


def _scale_shapes(count: tuple[int, int]) -> tuple[Shape, ...]:
    """Return the shapes in which scales occur; a single one may have no axis."""
    return (count, (*count, 1), *(((1,), ()) if count == (1, 1) else ()))


def _repack(
    tensors: Parts, block: Block, count: tuple[int, int], shape: tuple[int, int]
) -> dict[str, Tensor]:
    codes = tensors["weight"]
    if codes.dtype is torch.int8:
        codes = codes.view(torch.uint8) ^ OFFSET
    scale = scales_of_blocks(tensors["scale"].reshape(count), block, shape)
    parts = {"codes": codes, "block_scale": scale}
    if "zero" in tensors:
        zero = tensors["zero"].view(torch.uint8).reshape(count) ^ OFFSET
        parts["zero_point"] = scales_of_blocks(zero, block, shape)
    return parts | ({"bias": tensors["bias"]} if "bias" in tensors else {})
