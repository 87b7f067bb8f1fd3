"""A lock that admits one process to a folder and names the process that holds it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mezzotint.errors import BadRequest, CannotWrite

LOCK = "lock"
"""The locked file in the folder. It contains the name of the last process that held the lock."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder until the block ends. The system releases the lock if the process dies.

    Raises   BadRequest if another process holds the lock, CannotWrite if locking fails
    """
    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _cannot_lock(path, error) from error
    try:
        _lock(path, handle)
        yield
    finally:
        os.close(handle)


def _lock(path: Path, handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(handle, 200).decode(errors="replace").strip()
        raise BadRequest(
            f"{path.parent}: {holder or 'another process'} is comparing in this folder",
            "wait until it ends, or use a separate folder for each with -o.",
        ) from error
    except OSError as error:
        raise _cannot_lock(path, error) from error
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def _cannot_lock(path: Path, error: OSError) -> CannotWrite:
    return CannotWrite(
        f"{path}: cannot be locked: {error.strerror}", "name a folder on another disk."
    )
