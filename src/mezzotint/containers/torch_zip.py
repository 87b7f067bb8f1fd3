"""PyTorch's own files (.pt, .pth, .ckpt, .bin), read as data: no code in them is ever called.

A .pt file is a zip archive of uncompressed entries. `data.pkl` describes the tensors; `data/0`,
`data/1`, ... hold their bytes, which are read by offset.
Source: https://pytorch.org/docs/stable/notes/serialization.html#serialized-file-format
"""

import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mezzotint.containers.container import (
    MAX_TENSORS,
    ContainerHeader,
    TensorInfo,
    element_count,
)
from mezzotint.containers.restricted_pickle import (
    PickleInterpreter,
    TensorDescription,
    UnsafePickle,
)
from mezzotint.errors import BadRequest, BrokenFile
from mezzotint.hub import AnyPath
from mezzotint.untrusted.escaping import cut

MAGIC = b"PK\x03\x04"
MAX_PICKLE_BYTES = 64 * 2**20
LOCAL_HEADER_BYTES = 30
MAX_DIRECTORY_BYTES = 16 * 2**20
DIRECTORY_END = 2**16 + 22 + 76
"""Bytes at the end of a zip archive that state its directory's size: a comment and two records."""


class TorchZip:
    name = "torch_zip"
    title = "a zip archive, as torch.save writes them"
    suffixes: tuple[str, ...] = (".pt", ".pth", ".ckpt", ".bin")

    def sniff(self, path: AnyPath) -> bool:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC

    def read(self, path: AnyPath) -> ContainerHeader:
        """Read what torch.save stored, without the bytes of any tensor.

        Tensors are named by their keys, joined by dots: {"model": {"a": t}} holds "model.a".

        Raises  BrokenFile if the file is something else, is damaged, or asks for more than data
        """
        if not isinstance(path, Path):
            raise BadRequest(
                f"{path}: a .pt file is read from disk only", "download it, and name the file."
            )
        try:
            _check_directory(path)
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                program = _program(path, archive, members)
        except (
            zipfile.BadZipFile,
            EOFError,
            NotImplementedError,
            OSError,
            RuntimeError,
            ValueError,
        ) as error:
            raise BrokenFile(
                f"{path}: is not a file of torch.save ({cut(str(error))})", "download it again."
            ) from error
        content = _content(path, program)
        described = dict(_named_tensors(content))
        return ContainerHeader(
            TorchTensors(path, described, _entries(path, members)), content=content
        )


CONTAINER = TorchZip()


@dataclass(frozen=True)
class TorchTensors(Mapping[str, TensorInfo]):
    """The tensors of a .pt file; each is checked when it is looked up.

    A training state holds views and buffers that nobody reads. They are no reason to reject it.

    entries   {key of a storage: (first byte in the file, number of bytes)}
    """

    path: Path
    described: Mapping[str, TensorDescription]
    entries: Mapping[str, tuple[int, int]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)

    def __getitem__(self, name: str) -> TensorInfo:
        """Return a tensor. Raises BrokenFile unless it is contiguous and inside its storage."""
        described = self.described[name]
        size, count = described.storage.dtype.itemsize, element_count(described.shape)
        if count is None:
            raise BrokenFile(
                f"{self.path}: {name} has shape {described.shape}, which no tensor can have"
            )
        if count > 1 and described.stride != _contiguous_strides(described.shape):
            raise BrokenFile(
                f"{self.path}: {name} has strides {described.stride}, expected a contiguous tensor"
            )
        start, nbytes = self.entries.get(described.storage.key, (0, 0))
        first, last = described.offset * size, (described.offset + count) * size
        if last > nbytes:
            raise BrokenFile(
                f"{self.path}: {name} ends at byte {last:,} of a storage that has {nbytes:,}"
            )
        dtype = described.storage.dtype
        return TensorInfo(name, dtype, described.shape, self.path, start + first, start + last)


def _named_tensors(content: object) -> Iterator[tuple[str, TensorDescription]]:
    """Yield (keys joined by dots, tensor) of nested dictionaries; lists hold no named tensors.

    Each dictionary is visited once: a hostile pickle shares one so that it has 2**64 names.
    """
    pending, visited = [("", content)], set[int]()
    while pending:
        prefix, value = pending.pop()
        if not isinstance(value, dict) or id(value) in visited:
            continue
        visited.add(id(value))
        for key, item in value.items():
            if isinstance(item, TensorDescription):
                yield f"{prefix}{key}", item
            else:
                pending.append((f"{prefix}{key}.", item))


def _check_directory(path: Path) -> None:
    """Refuse a zip archive with a directory larger than a checkpoint's: zipfile reads it whole."""
    with path.open("rb") as stream:
        tail_start = max(path.stat().st_size - DIRECTORY_END, 0)
        stream.seek(tail_start)
        tail = stream.read(DIRECTORY_END)
    # The end record holds a 32-bit size; all ones mean that the zip64 record has the real one.
    # Source: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.14 and 4.3.16
    end, end64 = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    size = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    if size == 2**32 - 1 and end64 >= 0:
        size = int.from_bytes(tail[end64 + 40 : end64 + 48], "little")
    if size > MAX_DIRECTORY_BYTES:
        raise BrokenFile(
            f"{path}: its directory has {size:,} bytes, over the limit of {MAX_DIRECTORY_BYTES:,}"
        )


def _program(path: Path, archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> bytes:
    """Return the archive's one pickle."""
    programs = [member for member in members if member.filename.endswith("/data.pkl")]
    if len(programs) != 1 or len(members) > MAX_TENSORS:
        raise BrokenFile(
            f"{path}: has {len(programs)} data.pkl among {len(members)} entries, expected one"
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise BrokenFile(f"{path}: has compressed entries, which torch.save never writes")
    # zipfile reserves the stated compressed size, which only the directory states.
    if any(member.compress_size != member.file_size for member in members):
        raise BrokenFile(f"{path}: its directory states two sizes for one uncompressed entry")
    size = programs[0].file_size
    if size > MAX_PICKLE_BYTES:
        raise BrokenFile(
            f"{path}: data.pkl of {size:,} bytes is over the limit of {MAX_PICKLE_BYTES:,}"
        )
    return archive.read(programs[0])


def _content(path: Path, program: bytes) -> object:
    try:
        return PickleInterpreter().run(program)
    except UnsafePickle as refused:
        raise BrokenFile(
            f"{path}: {refused}, which no tensor needs; no code in the file was run",
            "a .pt file can carry code. Do not load this one with other tools "
            "unless you trust its author.",
        ) from refused
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise BrokenFile(
            f"{path}: its data.pkl is damaged ({cut(str(error))})", "download it again."
        ) from error


def _entries(path: Path, members: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """Return {key of a storage: (first byte, number of bytes)}, checked against the file's size."""
    size = path.stat().st_size
    entries = {}
    with path.open("rb") as stream:
        for member in members:
            stream.seek(member.header_offset)
            local = stream.read(LOCAL_HEADER_BYTES)
            # The local header repeats the name with padding of its own, so read both lengths here.
            names = sum(int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
            start = member.header_offset + LOCAL_HEADER_BYTES + names
            if len(local) < LOCAL_HEADER_BYTES or start + member.file_size > size:
                raise BrokenFile(
                    f"{path}: entry {cut(member.filename)} ends after the end of the file",
                    "download it again.",
                )
            parent, _, key = member.filename.rpartition("/")
            if parent.endswith("/data"):
                entries[key] = (start, member.file_size)
    return entries


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
