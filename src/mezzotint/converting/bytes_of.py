"""The bytes of a tensor that is to be written, a block at a time: copied from a file, or computed."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mezzotint.formats.safetensors_file import TensorInfo
from mezzotint.hub import local_copy
from mezzotint.saving import FileRange
from mezzotint.schemes import Scheme
from mezzotint.tensor import QuantTensor, real_weight

BLOCK_BYTES = 8 * 2**20
"""How much is copied between two reports of progress."""
DECODED_NUMBERS = 2**22
"""How many weights are decoded at a time."""


def copied(info: TensorInfo) -> Iterator[FileRange]:
    """A stored tensor's bytes as they are, without passing through memory here."""
    file = local_copy(info.file)
    for start in range(info.start, info.end, BLOCK_BYTES):
        yield FileRange(file, start, min(BLOCK_BYTES, info.end - start))


def copied_scale(info: TensorInfo, scheme: Scheme, part: str) -> Iterator[memoryview]:
    """A stored scale's bytes as they are; raises BadScale if it is not a usable number."""
    values = info.read()
    scheme.check_values(part, values, f"{info.file}: {info.name}")
    yield from bytes_of(values)


def bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, row-major."""
    if tensor.numel():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        yield memoryview(flat.numpy().data)


def decoded(pieces: Sequence[QuantTensor], dtype: torch.dtype) -> Iterator[memoryview]:
    """The real weights [out, in] of a module in `dtype`, some rows at a time."""
    for rows in row_blocks(pieces):
        yield from bytes_of(real_weight(rows).to(dtype))


def decoded_bias(pieces: Sequence[QuantTensor], dtype: torch.dtype) -> Iterator[memoryview]:
    """The bias [out] that goes with `decoded`, in `dtype`."""
    for rows in row_blocks(pieces):
        biases = [bias for piece in rows if (bias := piece.scheme.real_bias(piece.parts)) is not None]
        yield from bytes_of(torch.stack(biases).sum(dim=0).to(dtype))


def row_blocks(pieces: Sequence[QuantTensor]) -> Iterable[list[QuantTensor]]:
    """The pieces cut alike into blocks of output rows, so that no more than DECODED_NUMBERS are decoded at once."""
    out_features = pieces[0].shape[0]
    columns = sum(piece.shape[1] for piece in pieces)
    step = max(DECODED_NUMBERS // columns, 1)
    for start in range(0, out_features, step):
        index = torch.arange(start, min(start + step, out_features))
        yield [piece.rows(index) for piece in pieces]
