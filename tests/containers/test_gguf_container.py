"""GGUF headers: what gguf-py wrote is read, and what contradicts itself or the file is refused."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mezzotint.containers import BlockType, ContainerHeader, read_container
from mezzotint.containers import gguf as limits
from mezzotint.errors import BrokenFile, CheckpointError, NotSafetensors
from support import gguf_files
from support.gguf_files import Stored, content, entry, text

F32, Q8_0 = 0, 8
ONE = {"a.weight": Stored(F32, (4, 2), bytes(32))}


def read(folder: Path, data: bytes) -> ContainerHeader:
    file = folder / "a.gguf"
    file.write_bytes(data)
    return read_container(file)


def header(entries: bytes, keys: int, tensors: int = 0, descriptions: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys) + entries + descriptions


def array(kind: int, count: int, values: bytes) -> bytes:
    return text("a") + struct.pack("<IIQ", 9, kind, count) + values


def description(name: str, sides: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


def test_a_gguf_file_of_the_tool_is_read(data: Path) -> None:
    found = read_container(data / "gguf/wan.gguf")
    metadata = {key: json.loads(value) for key, value in found.metadata.items()}
    assert metadata["general.architecture"] == "wan"
    assert metadata["general.quantization_version"] == 2
    assert (metadata["test.numbers"], metadata["test.number"]) == ([1, 2, 3], 0.5)
    assert (metadata["test.flag"], metadata[limits.VERSION_KEY]) == (True, 3)
    embedding = found.tensors["patch_embedding.weight"]
    assert (embedding.shape, embedding.dtype) == ((32, 4, 1, 2, 2), torch.float32)
    layer = found.tensors["blocks.0.ffn.2.weight"]
    assert isinstance(layer.dtype, BlockType)
    assert (layer.shape, layer.storage_shape[0]) == ((32, 256), 32)
    assert layer.read().shape == layer.storage_shape


def test_gguf_versions_2_and_3_are_read_and_others_named(tmp_path: Path) -> None:
    assert read(tmp_path, content(ONE, version=2)).tensors["a.weight"].shape == (2, 4)
    for version in (0, 1, 4, 2**32 - 1):
        with pytest.raises(NotSafetensors, match=f"GGUF version {version}"):
            read(tmp_path, content(ONE, version=version))
    with pytest.raises(NotSafetensors, match="big-endian"):
        read(tmp_path, content(ONE, version=3 << 24))


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_gguf_alignment_is_honored(tmp_path: Path, alignment: int) -> None:
    values = [torch.arange(3.0), torch.arange(5.0)]
    tensors = {str(i): gguf_files.numbers(value) for i, value in enumerate(values)}
    metadata = {"general.alignment": alignment}
    found = read(tmp_path, content(tensors, metadata, alignment))
    assert all(torch.equal(found.tensors[str(i)].read(), v) for i, v in enumerate(values))


def test_offsets_beyond_4_gb_are_read(tmp_path: Path) -> None:
    """In a sparse file."""
    rows = 2**21
    large = description("a", (32, rows * 64), Q8_0, 0) + description("b", (8,), F32, 34 * 64 * rows)
    start = gguf_files.padded(header(b"", 0, 2, large))
    file = tmp_path / "a.gguf"
    with file.open("wb") as stream:
        stream.write(start)
        stream.seek(len(start) + 34 * 64 * rows)
        stream.write(struct.pack("<8f", *range(8)))
    found = read_container(file).tensors["b"]
    assert found.start > 2**32
    assert found.read().tolist() == list(range(8))


def test_the_shape_before_a_tensor_was_reshaped_is_restored(tmp_path: Path) -> None:
    key = f"{limits.ORIGINAL_SHAPE}a"
    stored = {"a": Stored(Q8_0, (256, 3), bytes(3 * 8 * 34))}
    info = read(tmp_path, content(stored, {key: [4, 64, 3, 1]})).tensors["a"]
    assert (info.shape, info.storage_shape) == ((4, 64, 3, 1), (3 * 8 * 34,))
    for wrong in ([4, 64, 3, 2], [], [-4, -64, 3], "4"):
        with pytest.raises(BrokenFile, match="orig_shape"):
            read(tmp_path, content(stored, {key: wrong}))


def test_long_arrays_are_skipped(tmp_path: Path) -> None:
    """Text encoders store the words and scores of their tokenizer as metadata."""
    words = array(8, 5000, b"".join(text(str(i)) for i in range(5000)))
    scores = array(6, 5000, bytes(4 * 5000)).replace(b"\1\0\0\0\0\0\0\0a", b"\1\0\0\0\0\0\0\0b", 1)
    found = read(tmp_path, gguf_files.padded(header(words + scores + entry("c", 7), 3)))
    assert json.loads(found.metadata["a"]) == "5,000 texts, not read"
    assert json.loads(found.metadata["b"]) == "5,000 values, not read"
    assert json.loads(found.metadata["c"]) == 7


def test_text_that_is_not_utf_8_is_escaped(tmp_path: Path) -> None:
    broken = text("a") + struct.pack("<I", 8) + text(b"caf\xe9")
    assert (
        json.loads(read(tmp_path, gguf_files.padded(header(broken, 1))).metadata["a"]) == "caf\\xe9"
    )


def nested(depth: int) -> bytes:
    return text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + bytes(64)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "over the limit of 100,000": lambda: header(b"", 10**6),
    "over the limit of 200,000": lambda: header(b"", 0, 10**6),
    "ends inside its header": lambda: header(b"", 90_000),
    "a text of 18,446,744,073,709,551,615": lambda: header(struct.pack("<Q", 2**64 - 1), 1) * 9,
    "a text of 1,001 bytes": lambda: header(text("a" * 1001), 1) + bytes(99),
    "not UTF-8": lambda: header(text(b"\xff") + bytes(99), 1),
    "repeats the metadata entry": lambda: header(entry("a", 1) * 2, 2),
    "type 13, which GGUF does not define": lambda: header(text("a") + b"\x0d" + bytes(99), 1),
    "more than 4 deep": lambda: header(nested(1000), 1),
    "an array of 18,446,744,073,709,551,615": lambda: header(array(4, 2**64 - 1, bytes(64)), 1),
    "an array of 2,000 arrays": lambda: header(array(9, 2000, bytes(90_000)), 1),
    "general.alignment is 0": lambda: content(ONE, {"general.alignment": 0}),
    "general.alignment is 24": lambda: content(ONE, {"general.alignment": 24}),
    "general.alignment is 2147483648": lambda: content(ONE, {"general.alignment": 2**31}),
    "general.alignment is '32'": lambda: content(ONE, {"general.alignment": "32"}),
    "has 9 dimensions": lambda: header(b"", 0, 1, description("a", (1,) * 9, F32, 0)) + bytes(99),
    "1,000,000,000 dimensions": lambda: (
        header(b"", 0, 1, text("a") + struct.pack("<I", 10**9)) + bytes(99)
    ),
    "which no tensor can have": lambda: content({"a": Stored(F32, (2**40, 2**40), bytes(32))}),
    "which Mezzotint does not know": lambda: content({"a": Stored(4, (4,), bytes(32))}),
    "not a multiple of 32": lambda: content({"a": Stored(Q8_0, (33, 2), bytes(68))}),
    "rows of 1 elements": lambda: content({"a": Stored(Q8_0, (), bytes(34))}),
    "is truncated": lambda: content({"a": Stored(F32, (9,), bytes(32))}),
    "belong to no tensor": lambda: content({"a": Stored(F32, (4,), bytes(64))}),
    "two tensors named a": lambda: (
        gguf_files.padded(
            header(b"", 0, 2, description("a", (8,), F32, 0) + description("a", (8,), F32, 32))
        )
        + bytes(64)
    ),
    "starts at byte 96, expected 128": lambda: (
        gguf_files.padded(
            header(b"", 0, 2, description("a", (16,), F32, 0) + description("b", (8,), F32, 0))
        )
        + bytes(96)
    ),
    "starts at byte 104": lambda: (
        gguf_files.padded(
            header(b"", 0, 2, description("a", (2,), F32, 0) + description("b", (2,), F32, 8))
        )
        + bytes(32)
    ),
    "starts at byte 224": lambda: (
        gguf_files.padded(
            header(b"", 0, 2, description("a", (8,), F32, 0) + description("b", (8,), F32, 128))
        )
        + bytes(160)
    ),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_gguf_headers_are_refused(tmp_path: Path, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, HOSTILE[message]())
    assert message in caught.value.message


def test_a_thousand_truncations_of_a_gguf_file_are_refused(data: Path, tmp_path: Path) -> None:
    whole = (data / "gguf/wan.gguf").read_bytes()
    last = max(info.end for info in read_container(data / "gguf/wan.gguf").tensors.values())
    points = {*range(4, 400), *range(400, last, last // 700), last - 1}
    assert len(points) >= 1000
    file = tmp_path / "a.gguf"
    file.write_bytes(whole)
    for length in sorted(points, reverse=True):
        with file.open("r+b") as stream:
            stream.truncate(length)
        with pytest.raises(BrokenFile):
            read_container(file)
