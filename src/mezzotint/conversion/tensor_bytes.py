"""The bytes of output tensors in blocks, copied from a file or computed."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mezzotint.containers import TensorInfo
from mezzotint.hub import local_copy
from mezzotint.saving import Block, FileRange
from mezzotint.schemes import Scheme
from mezzotint.tensor import QuantTensor, dequantize_pieces

BLOCK_BYTES = 8 * 2**20
"""Bytes that are copied between two progress reports."""
MAX_DEQUANTIZED_NUMBERS = 2**22
"""Largest number of weights that are dequantized at once, to limit memory."""


def copy_tensor(info: TensorInfo) -> Iterator[Block]:
    """Yield a stored tensor's bytes unchanged: ranges of its file, or its values if it has none."""
    if info.file_range is None:
        yield from tensor_bytes(info.read())
        return
    file, (first, end) = local_copy(info.file), info.file_range
    for start in range(first, end, BLOCK_BYTES):
        yield FileRange(file, start, min(BLOCK_BYTES, end - start))


def copy_scale(info: TensorInfo, scheme: Scheme, part: str) -> Iterator[memoryview]:
    """Yield a stored scale's bytes. Raises BadScale if it has an unusable value."""
    values = info.read()
    scheme.check_values(part, values, f"{info.file}: {info.name}")
    yield from tensor_bytes(values)


def tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes in row-major order."""
    if tensor.numel():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        yield memoryview(flat.numpy().data)


def dequantized_bytes(pieces: Sequence[QuantTensor], dtype: torch.dtype) -> Iterator[memoryview]:
    """Yield the bytes of a module's dequantized weight [out, in] in `dtype`."""
    for rows in row_blocks(pieces):
        yield from tensor_bytes(dequantize_pieces(rows).to(dtype))


def dequantized_bias_bytes(
    pieces: Sequence[QuantTensor], dtype: torch.dtype
) -> Iterator[memoryview]:
    """Yield the bytes of a module's dequantized bias [out] in `dtype`."""
    for rows in row_blocks(pieces):
        biases = [
            bias
            for piece in rows
            if (bias := piece.scheme.dequantize_bias(piece.parts)) is not None
        ]
        yield from tensor_bytes(torch.stack(biases).sum(dim=0).to(dtype))


def row_blocks(pieces: Sequence[QuantTensor]) -> Iterable[list[QuantTensor]]:
    """Split the pieces into blocks of the same output rows, to limit memory.

    A block has at most MAX_DEQUANTIZED_NUMBERS weights, or one row.
    """
    out_features = pieces[0].shape[0]
    columns = sum(piece.shape[1] for piece in pieces)
    step = max(MAX_DEQUANTIZED_NUMBERS // columns, 1)
    for start in range(0, out_features, step):
        index = torch.arange(start, min(start + step, out_features))
        yield [piece.select_rows(index) for piece in pieces]
