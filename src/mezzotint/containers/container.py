"""What a container is: a file that stores named tensors, and the header that describes them.

One module of this package is one container. It defines `CONTAINER`, and `discover.collect` finds
it. Nothing outside the package asks which container a tensor came from.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mezzotint.errors import BrokenFile
from mezzotint.hub import AnyPath, HubPath

MAX_TENSORS = 200_000
"""Tensors in a file or an index; a model has about 3,000."""
MAX_ELEMENTS = 2**60
"""Elements in a tensor; safetensors rejects counts that do not fit 64 bits."""
MAX_RANK = 8
"""Dimensions of a tensor; models have up to five."""
HUB_CONNECTIONS = 16
"""Tensors requested from the Hub at the same time."""


@dataclass(frozen=True)
class BlockType:
    """A dtype that packs consecutive elements of a row into blocks, as GGUF's Q4_K does.

    name            the container's name for it, such as "Q4_K"
    block_elements  elements of one block
    block_bytes     bytes of one block, scales included
    """

    name: str
    block_elements: int
    block_bytes: int

    def __str__(self) -> str:
        return self.name

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the bytes that store a tensor of `shape`: rows of whole blocks."""
        *leading, columns = shape or (1,)
        return (*leading, columns // self.block_elements * self.block_bytes)


DType = torch.dtype | BlockType


class ByteReader(Protocol):
    """Read the bytes [start, end) of a file; a shorter result means that the file ended."""

    def __call__(self, file: AnyPath, start: int, end: int) -> bytearray: ...


def read_range(file: AnyPath, start: int, end: int) -> bytearray:
    """Return the bytes [start, end) of a file that stores its tensors uncompressed."""
    buffer = bytearray(end - start)
    # Reading ahead would request more of the Hub than the tensor.
    stream = file.open("rb", read_ahead=0) if isinstance(file, HubPath) else file.open("rb")
    with stream:
        stream.seek(start)
        return buffer[: stream.readinto(buffer)]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, without its values.

    dtype       a torch dtype, or a BlockType
    shape       logical shape; the values of a BlockType have `storage_shape`
    start, end  range [start, end) that `read_bytes` reads
    read_bytes  the container's reader
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: AnyPath
    start: int
    end: int
    read_bytes: ByteReader = read_range

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def file_range(self) -> tuple[int, int] | None:
        """Range [start, end) of `file` that stores the values as they are, None if none does."""
        return (self.start, self.end) if self.read_bytes is read_range else None

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of what `read` returns: uint8 for a BlockType."""
        return torch.uint8 if isinstance(self.dtype, BlockType) else self.dtype

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """The shape of what `read` returns: [..., bytes of a row] for a BlockType."""
        return (
            self.dtype.packed_shape(self.shape) if isinstance(self.dtype, BlockType) else self.shape
        )

    def to_meta(self) -> Tensor:
        """Return what `read` returns, on the meta device."""
        return torch.empty(self.storage_shape, dtype=self.storage_dtype, device="meta")

    def read(self) -> Tensor:
        """Return the stored values, on the CPU, in newly allocated memory.

        Raises   BrokenFile if the file ends inside the tensor
        """
        buffer = self.read_bytes(self.file, self.start, self.end)
        if len(buffer) != self.nbytes:
            raise BrokenFile(f"{self.file}: ended inside tensor {self.name}")
        if not buffer:
            return torch.empty(self.storage_shape, dtype=self.storage_dtype)
        values = torch.frombuffer(buffer, dtype=torch.uint8)
        return values.view(self.storage_dtype).reshape(self.storage_shape)

    def first(self, count: int) -> "TensorInfo":
        """Return at most the first `count` stored values, as a vector."""
        size = self.storage_dtype.itemsize
        count = min(count, self.nbytes // size)
        end = self.start + count * size
        return replace(self, dtype=self.storage_dtype, shape=(count,), end=end)

    def slice_rows(self, first: int, last: int) -> "TensorInfo":
        """Return rows [first, last) of the first axis."""
        size = self.nbytes // max(self.shape[0], 1)
        start, end = self.start + first * size, self.start + last * size
        return replace(self, shape=(last - first, *self.shape[1:]), start=start, end=end)


def read_all(infos: Sequence[TensorInfo]) -> list[Tensor]:
    """Return the values of many small tensors; requests to the Hub run in parallel."""
    if all(isinstance(info.file, Path) for info in infos):
        return [info.read() for info in infos]
    with ThreadPoolExecutor(HUB_CONNECTIONS) as pool:
        return list(pool.map(TensorInfo.read, infos))


@dataclass(frozen=True)
class ContainerHeader:
    """What one file says about its tensors.

    tensors   {name: TensorInfo}, each checked against the size of the file
    metadata  {key: text}; a container with typed metadata writes its values as JSON
    content   the Python object that torch.save stored; None for other containers
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    content: object = None


class Container(Protocol):
    """One kind of file.

    title      name in error messages, with its article
    suffixes   suffixes of such files, to list the weights of a folder
    """

    name: str
    title: str
    suffixes: tuple[str, ...]

    def sniff(self, path: AnyPath) -> bool:
        """Return whether the first bytes are those of such a file; a damaged file may be one."""
        ...

    def read(self, path: AnyPath) -> ContainerHeader:
        """Read the header. Raises BrokenFile if it contradicts itself or the file's size."""
        ...


def element_count(shape: Sequence[int]) -> int | None:
    """Return the number of elements of a shape, or None if no tensor can have that shape."""
    # The loop stops at the limit, because the product of a malicious shape can take minutes.
    if len(shape) > MAX_RANK:
        return None
    count = 1
    for side in shape:
        count *= side or 1
        if count >= MAX_ELEMENTS:
            return None
    return 0 if 0 in shape else count
