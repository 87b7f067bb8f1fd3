"""Bytes of stored tensors on their way into an output."""

import zlib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from mezzotint.containers import TensorInfo, read_container
from mezzotint.conversion.tensor_bytes import copy_tensor, tensor_bytes
from mezzotint.hub import AnyPath
from mezzotint.saving import FileRange

VALUES = torch.arange(12, dtype=torch.float32).view(3, 4)


def stored(folder: Path) -> TensorInfo:
    save_file({"a": VALUES}, folder / "a.safetensors")
    return read_container(folder / "a.safetensors").tensors["a"]


def test_stored_bytes_are_copied_as_a_file_range(tmp_path: Path) -> None:
    info = stored(tmp_path)
    assert list(copy_tensor(info)) == [FileRange(info.file, info.start, info.nbytes)]


def test_compressed_tensor_has_no_file_range_and_is_read(tmp_path: Path) -> None:
    def read_compressed(file: AnyPath, start: int, end: int) -> bytearray:
        return bytearray(zlib.decompress(file.read_bytes())[start:end])

    (tmp_path / "a.z").write_bytes(zlib.compress(b"".join(tensor_bytes(VALUES))))
    info = replace(
        stored(tmp_path), file=tmp_path / "a.z", start=0, end=48, read_bytes=read_compressed
    )
    assert info.file_range is None
    assert b"".join(copy_tensor(info)) == b"".join(tensor_bytes(VALUES))
