"""PyTorch's own checkpoint files (.pt), read as data: nothing in them is ever called.

A .pt file is a zip archive of uncompressed entries: `data.pkl` describes the tensors, `data/0`, `data/1`, ... hold
their bytes, which are read by offset.
"""

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.errors import BrokenFile
from mezzotint.escaping import cut
from mezzotint.formats.pickled import Described, Machine, Refused
from mezzotint.formats.safetensors_file import MAX_TENSORS, TensorInfo, number_of_values

MAX_PICKLE_BYTES = 64 * 2**20
LOCAL_HEADER_BYTES = 30
MAX_DIRECTORY_BYTES = 16 * 2**20
DIRECTORY_END = 2**16 + 22 + 76
"""Bytes at the end of a zip archive in which its directory's size stands: comment and two records."""


@dataclass(frozen=True)
class TorchFile:
    """A .pt file: `content` is what was saved, with a `Described` in place of each tensor.

    entries   {key of a storage: (first byte in the file, number of bytes)}
    """

    path: Path
    content: Any
    entries: Mapping[str, tuple[int, int]]

    def tensor(self, name: str, described: object) -> TensorInfo:
        """Where a described tensor lies; BrokenFile if it is none, is not contiguous, or is not in the file."""
        if not isinstance(described, Described):
            raise BrokenFile(f"{self.path}: {name} is a {type(described).__name__}, expected a tensor")
        size, count = described.storage.dtype.itemsize, number_of_values(described.shape)
        if count is None:
            raise BrokenFile(f"{self.path}: {name} has shape {described.shape}, which no tensor can have")
        start, nbytes = self.entries.get(described.storage.key, (0, 0))
        first, last = described.offset * size, (described.offset + count) * size
        if count > 1 and described.stride != _contiguous(described.shape):
            raise BrokenFile(f"{self.path}: {name} has strides {described.stride}, expected a contiguous tensor")
        if last > nbytes:
            raise BrokenFile(f"{self.path}: {name} ends at byte {last:,} of a storage that has {nbytes:,}")
        return TensorInfo(name, described.storage.dtype, described.shape, self.path, start + first, start + last)


def read_torch_file(path: Path) -> TorchFile:
    """What torch.save wrote to `path`, without a tensor's bytes.

    Raises  BrokenFile if it is no such file, is damaged, or asks for anything but tensors and plain data
    """
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            program = _program(path, archive, members)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        raise BrokenFile(f"{path}: is not a file of torch.save ({cut(str(error))})", "download it again.") from error
    return TorchFile(path, _content(path, program), _entries(path, members))


def _check_directory(path: Path) -> None:
    """Refuse a zip archive whose directory is larger than that of any checkpoint: it is read whole."""
    with path.open("rb") as stream:
        tail_start = max(path.stat().st_size - DIRECTORY_END, 0)
        stream.seek(tail_start)
        tail = stream.read(DIRECTORY_END)
    end, end64 = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    size = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    if size == 2**32 - 1 and end64 >= 0:
        size = int.from_bytes(tail[end64 + 40 : end64 + 48], "little")
    if size > MAX_DIRECTORY_BYTES:
        raise BrokenFile(f"{path}: its directory has {size:,} bytes, over the limit of {MAX_DIRECTORY_BYTES:,}")


def _program(path: Path, archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> bytes:
    found = [member for member in members if member.filename.endswith("/data.pkl")]
    if len(found) != 1 or len(members) > MAX_TENSORS:
        raise BrokenFile(f"{path}: has {len(found)} data.pkl among {len(members)} entries, expected one")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise BrokenFile(f"{path}: has compressed entries, which torch.save never writes")
    if found[0].file_size > MAX_PICKLE_BYTES:
        raise BrokenFile(f"{path}: data.pkl of {found[0].file_size:,} bytes is over the limit of {MAX_PICKLE_BYTES:,}")
    return archive.read(found[0])


def _content(path: Path, program: bytes) -> Any:
    try:
        return Machine().run(program)
    except Refused as refused:
        raise BrokenFile(
            f"{path}: {refused}, which no tensor needs; nothing of the file was run",
            "a .pt file can carry code. Do not load this one with other tools, unless you trust who made it.",
        ) from refused
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise BrokenFile(f"{path}: its data.pkl is damaged ({cut(str(error))})", "download it again.") from error


def _entries(path: Path, members: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """{key of a storage: (first byte in the file, number of bytes)}, each held against the file's size."""
    size = path.stat().st_size
    found = {}
    with path.open("rb") as stream:
        for member in members:
            stream.seek(member.header_offset)
            local = stream.read(LOCAL_HEADER_BYTES)
            names = sum(int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
            start = member.header_offset + LOCAL_HEADER_BYTES + names
            if len(local) < LOCAL_HEADER_BYTES or start + member.file_size > size:
                raise BrokenFile(f"{path}: entry {cut(member.filename)} ends after the file does", "download it again.")
            parent, _, key = member.filename.rpartition("/")
            if parent.endswith("/data"):
                found[key] = (start, member.file_size)
    return found


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
