"""GGUF files: typed metadata, then the sides, type and offset of each tensor, then the bytes.

Every claim of the header is checked against the size of the file, and everything that takes
memory or time is limited. Only the header is read until the values of a tensor are needed.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, Protocol

from mezzotint.containers.container import (
    MAX_RANK,
    MAX_TENSORS,
    BlockType,
    ContainerHeader,
    TensorInfo,
    element_count,
)
from mezzotint.containers.gguf_types import TYPES
from mezzotint.errors import BrokenFile, NotSafetensors
from mezzotint.hub import AnyPath
from mezzotint.untrusted.escaping import cut, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 100_000
"""Metadata entries; a converter writes up to one for each tensor, which makes 2,000."""
MAX_NAME = 1_000
"""Bytes in the name of a tensor or a key; models have up to a hundred."""
MAX_TEXT = 16 * 2**20
"""Bytes of all texts in the metadata that are kept."""
MAX_KEPT = 1_024
"""Elements of an array that is kept; a longer one, such as a tokenizer's words, is skipped."""
MAX_VALUES = 2_000_000
"""Texts and nested arrays in all arrays; the largest tokenizer has 800,000."""
MAX_DEPTH = 4
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 2**20
TEXT, ARRAY = 8, 9
FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""{type of a metadata value: its `struct` format}; TEXT and ARRAY follow a length."""
SCALARS = {kind: struct.Struct(f"<{code}") for kind, code in FORMATS.items()}
U32, U64 = SCALARS[4], SCALARS[10]
MIN_KEY_BYTES, MIN_TENSOR_BYTES = 13, 24
"""Bytes of the smallest metadata entry, and of the smallest description of a tensor."""
VERSION_KEY = "GGUF.version"
"""Entry that is added to the metadata; gguf-py's reader has a field of this name."""
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Key of a tensor's shape before ComfyUI-GGUF reshaped it to rows of whole blocks.

Source: https://github.com/city96/ComfyUI-GGUF/blob/795e4515/tools/convert.py
"""


class GGUF:
    name = "gguf"
    title = "a GGUF file"
    suffixes = (".gguf",)

    def sniff(self, path: AnyPath) -> bool:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC

    def read(self, path: AnyPath) -> ContainerHeader:
        with path.open("rb") as stream:
            cursor = _Cursor(path, stream)
            version = _read_version(cursor)
            tensors = cursor.count(MAX_TENSORS, MIN_TENSOR_BYTES, "tensors")
            keys = cursor.count(MAX_KEYS, MIN_KEY_BYTES, "metadata entries")
            metadata = _read_metadata(cursor, keys)
            alignment = _alignment(path, metadata)
            described = [_read_description(cursor) for _ in range(tensors)]
        start = -(-cursor.position // alignment) * alignment
        infos: dict[str, TensorInfo] = {}
        for description in described:
            info = _tensor_info(path, description, metadata, start)
            if info.name in infos:
                raise BrokenFile(f"{path}: describes two tensors named {cut(info.name)}")
            infos[info.name] = info
        _check_coverage(path, infos, start, alignment)
        metadata[VERSION_KEY] = version
        return ContainerHeader(infos, {key: json.dumps(value) for key, value in metadata.items()})


CONTAINER = GGUF()


class Stream(Protocol):
    """A file that is open for reading."""

    def read(self, size: int = -1, /) -> bytes | None: ...

    def seek(self, offset: int, /) -> int: ...


class _Cursor:
    """Reads the header front to back; every read is checked against the size of the file."""

    def __init__(self, path: AnyPath, stream: Stream) -> None:
        self.path, self.stream = path, stream
        self.size = path.stat().st_size
        self.position = 0
        self.text_bytes = self.values = 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes. Raises BrokenFile if the file ends before."""
        self._advance(count)
        data = self.stream.read(count)
        if data is None or len(data) != count:
            raise self._truncated()
        return data

    def skip(self, count: int) -> None:
        self._advance(count)
        self.stream.seek(self.position)

    def _advance(self, count: int) -> None:
        if count > self.size - self.position:
            raise self._truncated()
        self.position += count

    def _truncated(self) -> BrokenFile:
        return BrokenFile(
            f"{self.path}: ends inside its header, which the file's {self.size:,} bytes are too "
            "few for",
            "it is truncated; download it again.",
        )

    def number(self, kind: struct.Struct) -> Any:
        """Return the next number."""
        return kind.unpack(self.take(kind.size))[0]

    def count(self, limit: int, smallest: int, what: str) -> int:
        """Return a number of entries of at least `smallest` bytes, which must be in the file."""
        count: int = self.number(U64)
        if count > limit:
            raise BrokenFile(f"{self.path}: states {count:,} {what}, over the limit of {limit:,}")
        if count * smallest > self.size - self.position:
            raise self._truncated()
        return count

    def text(self, limit: int) -> bytes:
        """Return the bytes of the next text."""
        length: int = self.number(U64)
        if length > min(limit, self.size - self.position):
            raise BrokenFile(
                f"{self.path}: states a text of {length:,} bytes in its header, "
                f"over the limit of {min(limit, self.size - self.position):,}"
            )
        return self.take(length)

    def name(self) -> str:
        """Return the next name, of a key or a tensor."""
        text = self.text(MAX_NAME)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BrokenFile(
                f"{self.path}: a name in its header is not UTF-8: {shown(text)}"
            ) from error

    def kept_text(self) -> str:
        """Return the next text of the metadata. Broken UTF-8 is escaped."""
        text = self.text(MAX_TEXT - self.text_bytes)
        self.text_bytes += len(text)
        return text.decode("utf-8", "backslashreplace")

    def count_values(self, count: int) -> None:
        """Raise BrokenFile if arrays have more values that are visited one by one than allowed."""
        self.values += count
        if self.values > MAX_VALUES:
            raise BrokenFile(
                f"{self.path}: its metadata have more than {MAX_VALUES:,} values in arrays"
            )


def _read_version(cursor: _Cursor) -> int:
    cursor.take(len(MAGIC))
    version: int = cursor.number(U32)
    if version in VERSIONS:
        return version
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in VERSIONS:
        raise NotSafetensors(
            f"{cursor.path}: is a big-endian GGUF file, and only little-endian ones are read",
            "use the little-endian version of the model.",
        )
    raise NotSafetensors(
        f"{cursor.path}: is GGUF version {version}, expected {' or '.join(map(str, VERSIONS))}",
        "download a current version of the model.",
    )


def _read_metadata(cursor: _Cursor, keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.name()
        if key in metadata:
            raise BrokenFile(f"{cursor.path}: repeats the metadata entry {cut(key)}")
        metadata[key] = _read_value(cursor, cursor.number(U32))
    return metadata


def _read_value(cursor: _Cursor, kind: int, depth: int = 0) -> Any:
    if kind in SCALARS:
        return cursor.number(SCALARS[kind])
    if kind == TEXT:
        return cursor.kept_text()
    if kind == ARRAY:
        return _read_array(cursor, depth + 1)
    raise BrokenFile(f"{cursor.path}: a metadata value has type {kind}, which GGUF does not define")


def _read_array(cursor: _Cursor, depth: int) -> Any:
    """Return a short array as a list; skip a long one and return a sentence about it."""
    kind, count = cursor.number(U32), cursor.number(U64)
    if depth > MAX_DEPTH:
        raise BrokenFile(f"{cursor.path}: nests arrays in its metadata more than {MAX_DEPTH} deep")
    if count * (SCALARS[kind].size if kind in SCALARS else 1) > cursor.size - cursor.position:
        raise BrokenFile(f"{cursor.path}: states an array of {count:,} values, more than it has")
    if kind in SCALARS and count > MAX_KEPT:
        cursor.skip(count * SCALARS[kind].size)
        return f"{count:,} values, not read"
    if kind == TEXT and count > MAX_KEPT:
        cursor.count_values(count)
        for _ in range(count):
            cursor.skip(cursor.number(U64))
        return f"{count:,} texts, not read"
    if count > MAX_KEPT and kind == ARRAY:
        raise BrokenFile(f"{cursor.path}: states an array of {count:,} arrays in its metadata")
    cursor.count_values(count)
    return [_read_value(cursor, kind, depth) for _ in range(count)]


def _alignment(path: AnyPath, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is int and 0 < alignment <= MAX_ALIGNMENT and alignment.bit_count() == 1:
        return alignment
    raise BrokenFile(
        f"{path}: general.alignment is {shown(alignment)}, expected a power of two "
        f"up to {MAX_ALIGNMENT:,}"
    )


Description = tuple[str, list[int], int, int]
"""What the header says of a tensor: name, sides (the shortest stride first), type, offset."""


def _read_description(cursor: _Cursor) -> Description:
    name = cursor.name()
    rank: int = cursor.number(U32)
    if rank > MAX_RANK:
        raise BrokenFile(f"{cursor.path}: {cut(name)} has {rank:,} dimensions, over {MAX_RANK}")
    sides = list(struct.unpack(f"<{rank}Q", cursor.take(rank * U64.size)))
    return name, sides, cursor.number(U32), cursor.number(U64)


def _tensor_info(
    path: AnyPath, description: Description, metadata: Mapping[str, Any], data_start: int
) -> TensorInfo:
    name, sides, kind, offset = description
    if kind not in TYPES:
        raise BrokenFile(f"{path}: {name} has type {kind}, which Mezzotint does not know")
    dtype, count = TYPES[kind], element_count(sides)
    if count is None:
        raise BrokenFile(f"{path}: {name} has shape {shown(sides)}, which no tensor can have")
    if isinstance(dtype, BlockType):
        if not sides or sides[0] % dtype.block_elements:
            raise BrokenFile(
                f"{path}: {name} is {dtype} with rows of {sides[0] if sides else 1:,} elements, "
                f"which is not a multiple of {dtype.block_elements}"
            )
        nbytes = count // dtype.block_elements * dtype.block_bytes
    else:
        nbytes = count * dtype.itemsize
    start = data_start + offset
    shape = _shape(path, name, sides, count, metadata)
    return TensorInfo(name, dtype, shape, path, start, start + nbytes)


def _shape(
    path: AnyPath, name: str, sides: list[int], count: int, metadata: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return the shape in PyTorch's order; a converter that changed it has noted the original."""
    original = metadata.get(ORIGINAL_SHAPE + name)
    if original is None:
        return tuple(reversed(sides))
    if (
        not isinstance(original, list)
        or any(type(side) is not int or side < 0 for side in original)
        or element_count(original) != count
    ):
        raise BrokenFile(
            f"{path}: {ORIGINAL_SHAPE}{name} is {shown(original)}, expected the sides of a tensor "
            f"of {count:,} elements"
        )
    return tuple(original)


def _check_coverage(
    path: AnyPath, infos: Mapping[str, TensorInfo], data_start: int, alignment: int
) -> None:
    """Check that tensors are aligned and fill the file; only padding lies between them."""
    size, position = path.stat().st_size, data_start
    for info in sorted(infos.values(), key=lambda info: (info.start, info.end)):
        if (
            not position <= info.start < position + alignment
            or (info.start - data_start) % alignment
        ):
            raise BrokenFile(
                f"{path}: {info.name} starts at byte {info.start:,}, expected "
                f"{data_start + math.ceil((position - data_start) / alignment) * alignment:,}"
            )
        position = info.end
    if position > size and infos:
        raise BrokenFile(
            f"{path}: is truncated: its header promises {position:,} bytes, and it has {size:,}",
            "download it again.",
        )
    if size - position >= alignment:
        raise BrokenFile(f"{path}: has {size - position:,} bytes that belong to no tensor")
