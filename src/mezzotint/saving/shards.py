"""Safetensors files written front to back, without holding one in memory.

Every name, dtype and shape is known before the first byte is written, so the header is written first and the bytes of
the tensors follow. Tensors that are made together form a group; a group's bytes pass by in blocks and are gone.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mezzotint.containers.safetensors import DTYPES

DTYPE_NAMES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_MULTIPLE = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file that is to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileRange:
    """Bytes that are copied from a file as they are: `nbytes` of them, from `start` on."""

    file: Path
    start: int
    nbytes: int


Block = memoryview | FileRange
"""Bytes on their way into a file: in memory, or where they lie."""


@dataclass(frozen=True)
class Group:
    """Tensors that are made together and lie side by side in the file.

    blocks   yields the bytes of all entries, in their order; a block may be overwritten once the next is asked for.
             A group that yields ranges of files has one entry.
    """

    entries: tuple[Entry, ...]
    blocks: Callable[[], Iterator[Block]]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class Shard:
    """One safetensors file that is to be written; `name` is its path inside the output."""

    name: str
    groups: tuple[Group, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def header(self) -> bytes:
        """The file's first bytes: the length, then JSON padded with spaces, as safetensors has it."""
        entries: dict[str, Any] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        start = 0
        for entry in (entry for group in self.groups for entry in group.entries):
            end = start + entry.nbytes
            entries[entry.key] = {
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": entry.shape,
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % HEADER_MULTIPLE)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        return len(self.header()) + sum(group.nbytes for group in self.groups)


@dataclass(frozen=True)
class ShardRecord:
    """A file that is on the disk: its size in bytes and the SHA-256 of its content, in hex."""

    size: int
    sha256: str


def split_into_shards(
    groups: Sequence[Group], limit: int | None, folder: str, stem: str, metadata: Mapping[str, str]
) -> list[Shard]:
    """Groups in their order, cut into files `stem-00001-of-0000N.safetensors` of at most `limit` bytes of tensors.

    A group is never cut; one that is larger than the limit has a file of its own. None is no limit.
    """
    packs: list[list[Group]] = [[]]
    size = 0
    for group in _align_groups(groups):
        if packs[-1] and limit is not None and size + group.nbytes > limit:
            packs.append([])
            size = 0
        packs[-1].append(group)
        size += group.nbytes
    names = (
        [f"{stem}-{i + 1:05}-of-{len(packs):05}" for i in range(len(packs))]
        if len(packs) > 1
        else [stem]
    )
    return [
        Shard(f"{folder}{name}.safetensors", tuple(pack), metadata)
        for name, pack in zip(names, packs, strict=True)
    ]


def _align_groups(groups: Sequence[Group]) -> list[Group]:
    """The groups in an order that starts every tensor at a multiple of its item size, which readers rely on.

    Entries of a group stand by falling item size. A group whose bytes would shift what follows it off the grid comes
    last, taken apart where that is needed.
    """
    grid = max((entry.dtype.itemsize for group in groups for entry in group.entries), default=1)
    even = [group for group in groups if group.nbytes % grid == 0]
    odd = [group for group in groups if group.nbytes % grid]
    singles = [single for group in odd for single in _split_group(group)]
    return even + sorted(singles, key=lambda group: -group.entries[0].dtype.itemsize)


def _split_group(group: Group) -> list[Group]:
    """One group for each entry; each makes all of the group's bytes and passes on its own."""
    if len(group.entries) == 1:
        return [group]
    singles = []
    start = 0
    for entry in group.entries:
        singles.append(Group((entry,), partial(_part, group, start, start + entry.nbytes)))
        start += entry.nbytes
    return singles


def _part(group: Group, start: int, end: int) -> Iterator[memoryview]:
    """Bytes [start, end) of a group."""
    position = 0
    for block in group.blocks():
        if isinstance(block, FileRange):
            raise TypeError("a group of several entries yields a range of a file")
        piece = block[max(start - position, 0) : max(end - position, 0)]
        position += len(block)
        if len(piece):
            yield piece


def weight_index(shards: Iterable[Shard], folder: str) -> dict[str, Any]:
    """The index that joins shards: {tensor: file name}, as diffusers and transformers read it."""
    entries = {
        entry.key: (shard.name.removeprefix(folder), entry.nbytes)
        for shard in shards
        for group in shard.groups
        for entry in group.entries
    }
    total = sum(nbytes for _, nbytes in entries.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": {key: name for key, (name, _) in sorted(entries.items())},
    }
