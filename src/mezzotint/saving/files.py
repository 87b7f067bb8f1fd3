"""Write files atomically: a failure leaves the old file or none, never a partial one."""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mezzotint.errors import BadRequest

PARTIAL = ".partial-"
"""Marks a file or folder that is being written: `.NAME.partial-SUFFIX`."""
RANDOM = "[a-z0-9_]{8}"
"""Regular expression of the random part of a name from `tempfile`."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` at the end, or removed on error.

    The bytes are synced to disk before the rename, and the rename before the block ends. Temporary
    files that killed runs left for the same path are removed first.
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
    """Remove temporary files of `atomic_write` for this path that no running process has locked."""
    ours = re.compile(re.escape(f".{path.name}{PARTIAL}") + RANDOM + re.escape(path.suffix))
    for file in path.parent.iterdir() if path.parent.is_dir() else ():
        if ours.fullmatch(file.name):
            _remove_if_free(file)


def _remove_if_free(temporary: Path) -> None:
    """Remove a temporary file unless a process has it locked."""
    with suppress(OSError):  # a file that cannot be removed does no harm
        handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()
        finally:
            os.close(handle)


def _temporary(path: Path) -> tuple[int, Path]:
    """Return the handle and path of a new temporary file.

    The file is locked while the handle is open, so that no other run removes it as a leftover.
    """
    while True:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}{PARTIAL}", suffix=path.suffix
        )
        # Without lock support, no other run can lock the file to remove it either.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if Path(name).exists():  # another run may have removed it before it was locked
            return handle, Path(name)
        os.close(handle)


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Lock the folder for this process; the lock ends with the process.

    wait     wait while another process has the lock
    Raises   BadRequest if another process has the lock and `wait` is not set
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BadRequest(
                f"{folder}: another run is writing this output", "wait until it ends."
            ) from error
        yield
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
