"""One safetensors file: its tensors' names, dtypes, shapes and byte ranges, every claim held against the file's size.

Only the first 8 + N bytes are read until a tensor's values are asked for.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mezzotint.errors import BrokenFile, NotACheckpoint, NotSafetensors
from mezzotint.escaping import cut, shown
from mezzotint.hub import AnyPath, HubPath

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 200_000
MAX_ITEMS = 5 * MAX_TENSORS
"""Commas in a header; a tensor of two dimensions has five. This and the next bound what parsing takes to 300 MB."""
MAX_FIELDS = 4 * MAX_TENSORS + 10_000
"""Colons in a header; a tensor has four."""
MAX_NUMBERS = 2**60
"""Product of the sides of a shape, zeros left out; safetensors refuses what does not fit 64 bits."""
MAX_RANK = 8
"""Dimensions of a tensor; models have up to five."""
MAX_NAME = 1_000
"""Characters of a tensor's name; models have up to a hundred."""
CONNECTIONS = 16
"""How many tensors on the Hub are asked for side by side."""
SNIFFED = 64
"""Bytes that are read to say what a file is that is no safetensors file."""
FAILED_DOWNLOADS = {
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch what it stands for: `git lfs pull`."),
    b"<!doctype html": ("an HTML page", "the download failed; download it again."),
    b"<html": ("an HTML page", "the download failed; download it again."),
    b"<?xml": ("an XML page", "the download failed; download it again."),
    b'{"': ("JSON text", "the download failed, or it is a configuration; name the weights."),
}
"""{how files begin that stand where a safetensors file should: (what they are, what to do)}"""
NOT_RUN = "take the safetensors form of the model; nothing of the file was run."
OTHER_KINDS = {
    b"GGUF": ("a GGUF file", "Mezzotint does not read GGUF; take the safetensors form of the model."),
    b"PK\x03\x04": ("a zip archive, as torch.save writes them", "take the safetensors form of the model."),
    b"\x80\x02": ("a Python pickle", NOT_RUN),
    b"\x80\x04": ("a Python pickle", NOT_RUN),
    b"\x80\x05": ("a Python pickle", NOT_RUN),
}
"""{how files of weights begin that are no safetensors files, and may be sound: (what they are, what to do)}"""
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, end) of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: AnyPath
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def outline(self) -> Tensor:
        """The tensor on the meta device: its dtype and shape without its values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self) -> Tensor:
        """The tensor's values, on the CPU, in memory of their own."""
        buffer = bytearray(self.nbytes)
        with self.file.open("rb", ahead=0) if isinstance(self.file, HubPath) else self.file.open("rb") as stream:
            stream.seek(self.start)
            if stream.readinto(buffer) != self.nbytes:
                raise BrokenFile(f"{self.file}: ended inside tensor {self.name}")
        if not buffer:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(self.dtype).reshape(self.shape)

    def first(self, count: int) -> "TensorInfo":
        """Where the first `count` values lie, as a vector, or all of them if there are fewer."""
        size = self.dtype.itemsize
        count = min(count, self.nbytes // size)
        return replace(self, shape=(count,), end=self.start + count * size)

    def rows(self, first: int, last: int) -> "TensorInfo":
        """Where rows [first, last) of the first axis lie."""
        size = self.nbytes // max(self.shape[0], 1)
        start, end = self.start + first * size, self.start + last * size
        return replace(self, shape=(last - first, *self.shape[1:]), start=start, end=end)


def read_each(infos: Sequence[TensorInfo]) -> list[Tensor]:
    """The values of many small tensors; those on the Hub are asked for side by side, as each is a request."""
    if all(isinstance(info.file, Path) for info in infos):
        return [info.read() for info in infos]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(TensorInfo.read, infos))


def read_file(file: AnyPath) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file, every claim checked against the file's size."""
    size = file.stat().st_size
    if size == 0:
        raise BrokenFile(f"{file}: the file is empty (0 bytes)", "download it again.")
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            _refuse_other_kinds(file, prefix + stream.read(SNIFFED))
            raise BrokenFile(
                f"{file}: says that its header has {length:,} bytes, and the file has {size:,}",
                "it is truncated, or no safetensors file; download it again.",
            )
        if length > MAX_HEADER_BYTES:
            raise BrokenFile(f"{file}: header of {length:,} bytes is over the limit of {MAX_HEADER_BYTES:,}")
        text = stream.read(length)
    entries = _parse_header(file, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise BrokenFile(f"{file}: __metadata__ is no map of strings")
    infos = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in entries.items()}
    _check_coverage(file, infos, 8 + length, size)
    return infos, metadata


def _refuse_other_kinds(file: AnyPath, start: bytes) -> None:
    """Raise NotACheckpoint, or NotSafetensors for another kind of weights, if files that begin like this are known."""
    start = start.lstrip().lower() if start.lstrip()[:1] in b"<{" else start
    for kinds, error in ((FAILED_DOWNLOADS, NotACheckpoint), (OTHER_KINDS, NotSafetensors)):
        for magic, (kind, hint) in kinds.items():
            if start.startswith(magic):
                raise error(f"{file}: is {kind}, not a safetensors file", hint)


def _strict_json(text: bytes) -> dict[str, Any]:
    """What safetensors calls JSON: UTF-8 from the first brace on, no key twice, no NaN, no -0, no half characters."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a key stands in it twice")
        return entries

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    def whole(digits: str) -> int:
        if digits == "-0":
            raise ValueError("-0 is no count")
        return int(digits)

    if text[:1] != b"{":
        raise ValueError("it is no JSON object: it does not begin with a brace")
    entries: dict[str, Any] = json.loads(
        text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_int=whole
    )
    if b"\\u" in text:
        json.dumps(entries, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be encoded
    return entries


def _parse_header(file: AnyPath, text: bytes) -> dict[str, Any]:
    most = {b",": MAX_ITEMS, b":": MAX_FIELDS, b"{": MAX_TENSORS + 2}
    if any(text.count(mark) > number for mark, number in most.items()):
        raise BrokenFile(f"{file}: header lists more than {MAX_ITEMS:,} items or {MAX_TENSORS:,} tensors")
    try:
        entries = _strict_json(text)
    except (ValueError, RecursionError) as error:
        raise BrokenFile(
            f"{file}: its header is not valid JSON ({cut(str(error))})", "is it a safetensors file?"
        ) from error
    if len(entries) > MAX_TENSORS:
        raise BrokenFile(f"{file}: header names {len(entries):,} tensors, over the limit of {MAX_TENSORS:,}")
    return entries


def _tensor_info(file: AnyPath, name: str, entry: Any, data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise BrokenFile(f"{file}: a tensor's name has more than {MAX_NAME:,} characters: {cut(name)}")
    if not isinstance(entry, dict):
        raise BrokenFile(f"{file}: header entry of {name} is no JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BrokenFile(f"{file}: {name} has dtype {shown(dtype)}, which is not known here")
    if not (_is_counts(shape) and _is_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise BrokenFile(f"{file}: {name} has shape {shown(shape)} and data_offsets {shown(offsets)}")
    start, end = offsets
    count = number_of_values(shape)
    if count is None:
        raise BrokenFile(
            f"{file}: {name} has {len(shape):,} dimensions, shape {shown(shape)}, which no tensor can have, "
            f"and has {end - start:,} bytes"
        )
    expected = count * DTYPES[dtype].itemsize
    if end - start != expected:
        raise BrokenFile(f"{file}: {name} is {dtype} {shape}, {expected:,} bytes, and has {end - start:,}")
    return TensorInfo(name, DTYPES[dtype], tuple(shape), file, data_start + start, data_start + end)


def number_of_values(shape: Sequence[int]) -> int | None:
    """Return how many values a tensor of this shape has, None where no tensor can have it.

    The product is refused while it is multiplied: a number of thousands of digits takes minutes.
    """
    if len(shape) > MAX_RANK:
        return None
    product = 1
    for side in shape:
        product *= side or 1
        if product >= MAX_NUMBERS:
            return None
    return 0 if 0 in shape else product


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_coverage(file: AnyPath, infos: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """The tensors fill the file from the header to its last byte, without gap or overlap."""
    position = data_start
    for info in sorted(infos.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            raise BrokenFile(f"{file}: {info.name} starts at byte {info.start:,}, expected {position:,}")
        position = info.end
    if position > size:
        raise BrokenFile(
            f"{file}: is truncated: its header promises {position:,} bytes, and it has {size:,}",
            "download it again.",
        )
    if position < size:
        raise BrokenFile(f"{file}: has {size - position:,} bytes that no tensor claims")
