"""False headers, truncated files and wrong shards: each raises one named error."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mezzotint.containers import safetensors
from mezzotint.errors import BrokenFile, CheckpointError, NotACheckpoint, UnexpectedTensor
from mezzotint.formats import read_header
from support.checkpoint_edits import WEIGHTS


def write(file: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_values_come_back_as_safetensors_wrote_them(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "fp8": torch.randn(4, 2).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 7),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        read = header.tensors[name].read()
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(read.float(), tensor.float())


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(offsets=(0, 4))}, bytes(4), "8 bytes, and has 4"),
        ({"a": entry(dtype="Q3")}, bytes(8), "dtype 'Q3'"),
        ({"a": entry(dtype=["F32"])}, bytes(8), "dtype"),
        ({"a": entry(shape=(-1,))}, bytes(8), "shape"),
        ({"a": entry(shape=(True,))}, bytes(8), "shape"),
        ({"a": entry(shape=(2**62, 4))}, bytes(8), "and has 8"),
        ({"a": entry(offsets=(4, 12))}, bytes(12), "starts at byte"),
        ({"a": entry(), "b": entry()}, bytes(8), "starts at byte"),
        ({"a": entry()}, bytes(7), "is truncated"),
        ({"a": entry()}, bytes(9), "belong to no tensor"),
        ({"a": 3}, b"", "not a JSON object"),
        ({"__metadata__": {"a": 1}}, b"", "not a map of strings"),
        (b"[]", b"", "not a JSON object"),
        (b"{", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "repeats a key"),
    ],
)
def test_a_false_header_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(BrokenFile, match=message):
        read_header(write(tmp_path / "a.safetensors", header, data))


def test_a_header_over_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", 10)
    with pytest.raises(BrokenFile, match="over the limit"):
        read_header(write(tmp_path / "a.safetensors", {"a": entry()}, bytes(8)))


def test_every_truncation_of_a_real_file_is_refused(fp8: Path) -> None:
    file = fp8 / WEIGHTS
    whole = file.read_bytes()
    for length in range(0, len(whole), len(whole) // 200):
        file.write_bytes(whole[:length])
        with pytest.raises(BrokenFile):
            read_header(fp8)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        (
            "broken_duplicate_key_across_shards",
            UnexpectedTensor,
            "context_embedder.bias is stored twice",
        ),
        ("broken_header_length_lie", BrokenFile, "says that its header has"),
        (
            "broken_missing_shard",
            BrokenFile,
            "not there: diffusion_pytorch_model-00002-of-00002.safetensors",
        ),
        ("broken_truncated_shard", BrokenFile, "00002-of-00002.safetensors: is truncated"),
        ("broken_zero_size_file", BrokenFile, r"is empty \(0 bytes\)"),
    ],
)
def test_damaged_exports_get_their_diagnosis(
    data: Path, case: str, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        read_header(data / case / "checkpoint")


def test_a_stale_index_of_a_complete_file_is_a_note(data: Path) -> None:
    header = read_header(data / "broken_stale_index_beside_single_file/checkpoint")
    assert [file.name for file in header.files] == [WEIGHTS]
    assert header.notes[0].startswith("ignored diffusion_pytorch_model.safetensors.index.json")


def test_an_index_may_not_leave_its_folder(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(BrokenFile, match="outside its folder"):
        read_header(tmp_path)


@pytest.mark.parametrize("shard", [1, None, ["a"]])
def test_an_index_names_shards_by_strings(tmp_path: Path, shard: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard, "b": "b.safetensors"}}))
    with pytest.raises(BrokenFile, match="names a shard by a value that is not a string"):
        read_header(tmp_path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345678\n",
            "a pointer of Git LFS",
        ),
        (b"\n<!DOCTYPE html><html><title>404</title>" * 9, "an HTML page"),
        (b'{"error":"Repository not found"}', "JSON text"),
        (b"GGUF" + b"\3\0\0\0" + bytes(99), "a GGUF file"),
        (pickle.dumps(list(range(99))), "a Python pickle"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes, kind: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(NotACheckpoint, match=f"is {kind}"):
        read_header(file)


def test_a_shard_that_the_index_does_not_name_is_a_note(fp8: Path) -> None:
    (fp8 / "old.safetensors").write_bytes((fp8 / WEIGHTS).read_bytes())
    weight_map = {"a": WEIGHTS}
    (fp8 / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert read_header(fp8).notes == ("ignored old.safetensors: the index does not name it",)


@pytest.mark.parametrize("make", ["absent", "empty", "pipeline", "two"])
def test_a_path_that_is_no_checkpoint_says_what_it_is(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "folder"
    if make != "absent":
        folder.mkdir()
    if make == "pipeline":
        (folder / "model_index.json").write_text("{}")
    if make == "two":
        save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
        save_file({"a": torch.zeros(1)}, folder / "b.safetensors")
    with pytest.raises(NotACheckpoint) as caught:
        read_header(folder)
    assert isinstance(caught.value, CheckpointError)
    assert str(folder) in caught.value.message
