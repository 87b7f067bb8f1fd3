"""Safetensors files: every claim of the header is checked against the size of the file.

Only the first 8 + N bytes are read until the values of a tensor are needed.
Source: https://huggingface.co/docs/safetensors/index#format
"""

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch

from mezzotint.containers.container import (
    MAX_TENSORS,
    ContainerHeader,
    TensorInfo,
    element_count,
)
from mezzotint.errors import BrokenFile
from mezzotint.hub import AnyPath
from mezzotint.untrusted.escaping import cut, shown

MAX_HEADER_BYTES = 16 * 2**20
MAX_ITEMS = 5 * MAX_TENSORS
"""Commas in a header, five for a 2-D tensor. With MAX_FIELDS, this limits parsing to 300 MB."""
MAX_FIELDS = 4 * MAX_TENSORS + 10_000
"""Colons in a header: a tensor has four."""
MAX_NAME = 1_000
"""Characters in the name of a tensor; models have up to a hundred."""
LENGTH_BYTES = 8
"""The file begins with the length of its header, in eight bytes."""
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


class Safetensors:
    name = "safetensors"
    title = "a safetensors file"
    suffixes: tuple[str, ...] = (".safetensors",)

    def sniff(self, path: AnyPath) -> bool:
        # The format has no magic number: the header's length must fit, and JSON must follow it.
        with path.open("rb") as stream:
            start = stream.read(LENGTH_BYTES + 1)
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        return start[LENGTH_BYTES:] == b"{" and length <= path.stat().st_size - LENGTH_BYTES

    def read(self, path: AnyPath) -> ContainerHeader:
        text = _header_text(path)
        entries = _parse_header(path, text)
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(
            not isinstance(value, str) for value in metadata.values()
        ):
            raise BrokenFile(f"{path}: __metadata__ is not a map of strings")
        start = LENGTH_BYTES + len(text)
        infos = {name: _tensor_info(path, name, entry, start) for name, entry in entries.items()}
        _check_coverage(path, infos, start)
        return ContainerHeader(infos, metadata)


CONTAINER = Safetensors()


def _header_text(file: AnyPath) -> bytes:
    size = file.stat().st_size
    if size == 0:
        raise BrokenFile(f"{file}: the file is empty (0 bytes)", "download it again.")
    with file.open("rb") as stream:
        prefix = stream.read(LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < LENGTH_BYTES or length > size - LENGTH_BYTES:
            raise BrokenFile(
                f"{file}: says that its header has {length:,} bytes, and the file has {size:,}",
                "it is truncated, or not a safetensors file; download it again.",
            )
        if length > MAX_HEADER_BYTES:
            raise BrokenFile(
                f"{file}: header of {length:,} bytes is over the limit of {MAX_HEADER_BYTES:,}"
            )
        return stream.read(length)


def _strict_json(text: bytes) -> dict[str, Any]:
    """Parse JSON as strictly as safetensors does, so that both read the same header.

    The text is UTF-8 and begins with a brace. A repeated key, NaN, -0 and lone surrogates are
    errors, raised as ValueError.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("it repeats a key")
        return entries

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    def whole(digits: str) -> int:
        if digits == "-0":
            raise ValueError("-0 is not a count")
        return int(digits)

    if text[:1] != b"{":
        raise ValueError("it is not a JSON object: it does not begin with a brace")
    entries: dict[str, Any] = json.loads(
        text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_int=whole
    )
    if b"\\u" in text:
        # Encoding raises ValueError for a lone surrogate.
        json.dumps(entries, ensure_ascii=False).encode("utf-8")
    return entries


def _parse_header(file: AnyPath, text: bytes) -> dict[str, Any]:
    limits = {b",": MAX_ITEMS, b":": MAX_FIELDS, b"{": MAX_TENSORS + 2}
    if any(text.count(mark) > number for mark, number in limits.items()):
        raise BrokenFile(
            f"{file}: header lists more than {MAX_ITEMS:,} items or {MAX_TENSORS:,} tensors"
        )
    try:
        entries = _strict_json(text)
    except (ValueError, RecursionError) as error:
        raise BrokenFile(
            f"{file}: its header is not valid JSON ({cut(str(error))})", "is it a safetensors file?"
        ) from error
    if len(entries) > MAX_TENSORS:
        raise BrokenFile(
            f"{file}: header names {len(entries):,} tensors, over the limit of {MAX_TENSORS:,}"
        )
    return entries


def _tensor_info(file: AnyPath, name: str, entry: Any, data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise BrokenFile(
            f"{file}: a tensor's name has more than {MAX_NAME:,} characters: {cut(name)}"
        )
    if not isinstance(entry, dict):
        raise BrokenFile(f"{file}: header entry of {name} is not a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BrokenFile(f"{file}: {name} has dtype {shown(dtype)}, which Mezzotint does not know")
    if not (
        _is_counts(shape) and _is_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]
    ):
        raise BrokenFile(
            f"{file}: {name} has shape {shown(shape)} and data_offsets {shown(offsets)}"
        )
    start, end = offsets
    count = element_count(shape)
    if count is None:
        raise BrokenFile(
            f"{file}: {name} has {len(shape):,} dimensions, shape {shown(shape)}, "
            f"which no tensor can have, and has {end - start:,} bytes"
        )
    expected = count * DTYPES[dtype].itemsize
    if end - start != expected:
        raise BrokenFile(
            f"{file}: {name} is {dtype} {shape}, {expected:,} bytes, and has {end - start:,}"
        )
    return TensorInfo(name, DTYPES[dtype], tuple(shape), file, data_start + start, data_start + end)


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def _check_coverage(file: AnyPath, infos: Mapping[str, TensorInfo], data_start: int) -> None:
    """Check that tensors fill the file from header to last byte, without gap or overlap."""
    size, position = file.stat().st_size, data_start
    for info in sorted(infos.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            raise BrokenFile(
                f"{file}: {info.name} starts at byte {info.start:,}, expected {position:,}"
            )
        position = info.end
    if position > size:
        raise BrokenFile(
            f"{file}: is truncated: its header promises {position:,} bytes, and it has {size:,}",
            "download it again.",
        )
    if position < size:
        raise BrokenFile(f"{file}: has {size - position:,} bytes that belong to no tensor")
