"""Safetensors files that are written front to back, without holding a whole file in memory.

Every name, dtype and shape is known in advance, so the header is written first and the tensors
follow. Tensors that are computed together form a group, which yields its bytes in blocks.
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
    """One tensor to write."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileRange:
    """`nbytes` bytes of a file, from `start` on, which are copied unchanged."""

    file: Path
    start: int
    nbytes: int


Block = memoryview | FileRange
"""Bytes to write: in memory, or in another file."""


@dataclass(frozen=True)
class Group:
    """Tensors that are computed together and stored next to each other.

    blocks   yields the bytes of all entries in order; a block may be overwritten once the next is
             requested. A group that yields file ranges has one entry.
    """

    entries: tuple[Entry, ...]
    blocks: Callable[[], Iterator[Block]]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class Shard:
    """One safetensors file to write; `name` is its path inside the output."""

    name: str
    groups: tuple[Group, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def header(self) -> bytes:
        """Return the file's first bytes: the header's length, then JSON padded with spaces.

        Source: https://github.com/huggingface/safetensors#format
        """
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
    """A written file: its size in bytes and the SHA-256 of its content, in hex."""

    size: int
    sha256: str


def split_into_shards(
    groups: Sequence[Group], limit: int | None, folder: str, stem: str, metadata: Mapping[str, str]
) -> list[Shard]:
    """Distribute groups, in order, over files `stem-00001-of-0000N.safetensors`.

    A group is never split; a group that is larger than the limit has a file to itself.

    limit   bytes of tensors per file; None for no limit
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
    """Order the groups so that every tensor starts at a multiple of its item size.

    Readers expect that alignment. The entries of a group are sorted by decreasing item size. A
    group that would misalign its successors comes last, split into its entries.
    """
    grid = max((entry.dtype.itemsize for group in groups for entry in group.entries), default=1)
    even = [group for group in groups if group.nbytes % grid == 0]
    odd = [group for group in groups if group.nbytes % grid]
    singles = [single for group in odd for single in split_group(group)]
    return even + sorted(singles, key=lambda group: -group.entries[0].dtype.itemsize)


def split_group(group: Group) -> list[Group]:
    """Return one group per entry; each computes all of the group's bytes and yields its part."""
    if len(group.entries) == 1:
        return [group]
    singles = []
    start = 0
    for entry in group.entries:
        singles.append(Group((entry,), partial(_part, group, start, start + entry.nbytes)))
        start += entry.nbytes
    return singles


def _part(group: Group, start: int, end: int) -> Iterator[memoryview]:
    """Yield the bytes [start, end) of a group."""
    position = 0
    for block in group.blocks():
        if isinstance(block, FileRange):
            raise TypeError("a group of several entries yields a range of a file")
        piece = block[max(start - position, 0) : max(end - position, 0)]
        position += len(block)
        if len(piece):
            yield piece


def weight_index(shards: Iterable[Shard], folder: str) -> dict[str, Any]:
    """Return the content of the index file that diffusers and transformers read."""
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
