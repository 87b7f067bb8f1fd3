"""A GGUF file that is written front to back, as `saving.shards` describes safetensors files.

Every tensor is a group of one entry, followed by zeros up to the alignment.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mezzotint.containers import DType
from mezzotint.containers.gguf import DEFAULT_ALIGNMENT, MAGIC, TEXT, VERSIONS
from mezzotint.containers.gguf_types import NUMBER_OF
from mezzotint.saving.shards import Block, Group, Shard

UINT32 = 4
MetadataValue = str | int
"""A text or a number below 2**32; both are what converters write."""


@dataclass(frozen=True)
class GGUFGroup(Group):
    """One tensor and the padding after it.

    dtype, shape   its type in GGUF, and its logical shape
    """

    dtype: DType = field(kw_only=True)
    shape: tuple[int, ...] = field(kw_only=True)

    @property
    def nbytes(self) -> int:
        size = super().nbytes
        return size + -size % DEFAULT_ALIGNMENT

    @classmethod
    def of(cls, group: Group, dtype: DType, shape: tuple[int, ...]) -> "GGUFGroup":
        """Return a group with one entry as a tensor of this type."""

        def padded() -> Iterator[Block]:
            yield from group.blocks()
            yield memoryview(bytes(-group.nbytes % DEFAULT_ALIGNMENT))

        return cls(group.entries, padded, dtype=dtype, shape=shape)

    def description(self, offset: int) -> bytes:
        """Return what the header says of the tensor."""
        (entry,) = self.entries
        rank = len(self.shape)
        sides = struct.pack(f"<I{rank}Q", rank, *reversed(self.shape))
        return _text(entry.key) + sides + struct.pack("<IQ", NUMBER_OF[str(self.dtype)], offset)


@dataclass(frozen=True)
class GGUFFile(Shard):
    """One GGUF file to write; its groups are GGUFGroups.

    values   {key of the metadata: value}
    """

    values: Mapping[str, MetadataValue] = field(default_factory=dict)

    def header(self) -> bytes:
        """Return the file's first bytes, up to the first tensor."""
        counts = struct.pack("<IQQ", VERSIONS[-1], len(self.groups), len(self.values))
        parts = [MAGIC, counts, *(_entry(key, value) for key, value in self.values.items())]
        offset = 0
        for group in self.groups:
            if isinstance(group, GGUFGroup):
                parts.append(group.description(offset))
                offset += group.nbytes
        text = b"".join(parts)
        return text + bytes(-len(text) % DEFAULT_ALIGNMENT)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _entry(key: str, value: MetadataValue) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", TEXT) + _text(value)
    return _text(key) + struct.pack("<II", UINT32, value)
