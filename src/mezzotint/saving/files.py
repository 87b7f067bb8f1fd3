"""Writing files so that a failure leaves the old one, or none, and never half of one."""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mezzotint.errors import BadRequest

PARTIAL = ".partial-"
"""What stands in the name of a file or folder that is being written, between its name and a mark of its own."""
RANDOM = "[a-z0-9_]{8}"
"""What `tempfile` puts into a name."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes `path` when the block ends, and vanishes if it raises.

    The bytes are on disk (fsync) before the name changes, and the name before the block is left. Temporary files that
    killed runs have left for the same path are removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    handle, temporary = _temporary(path)
    try:
        yield temporary
        fsync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        fsync(path.parent)
    finally:
        os.close(handle)
        with suppress(FileNotFoundError):
            temporary.unlink()


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of `whole_file` for this path that no running process holds."""
    ours = re.compile(re.escape(f".{path.name}{PARTIAL}") + RANDOM + re.escape(path.suffix))
    for file in path.parent.iterdir() if path.parent.is_dir() else ():
        if ours.fullmatch(file.name):
            _remove_if_free(file)


def _remove_if_free(temporary: Path) -> None:
    """Remove a temporary file unless a process has it locked, or it cannot be removed: it is in nobody's way."""
    with suppress(OSError):
        handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()
        finally:
            os.close(handle)


def _temporary(path: Path) -> tuple[int, Path]:
    """A new temporary file, locked as long as the handle is open, so that no other run takes it for a leftover."""
    while True:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}{PARTIAL}", suffix=path.suffix
        )
        with suppress(
            OSError
        ):  # a file system without locks: no run takes such a file for a leftover
            fcntl.flock(handle, fcntl.LOCK_EX)
        if Path(name).exists():  # another run may have removed it before it was locked
            return handle, Path(name)
        os.close(handle)


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process.

    wait   until another process has done with it; without it, that is a BadRequest
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BadRequest(
                f"{folder}: another run is writing this output", "wait until it has ended."
            ) from error
        yield
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
