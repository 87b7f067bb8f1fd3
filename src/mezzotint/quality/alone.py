"""One process at a time in a folder; the others are told which one is there."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mezzotint.errors import BadRequest, CannotWrite

LOCK = "lock"
"""The file in the folder that is locked; it names the process that holds the lock, or held it last."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder until the block ends; the lock goes with the process, however that ends.

    Raises   BadRequest if another holds it, which it names; CannotWrite if the folder cannot be locked
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
            "wait until it has ended, or give each its own folder with -o.",
        ) from error
    except OSError as error:
        raise _cannot_lock(path, error) from error
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def _cannot_lock(path: Path, error: OSError) -> CannotWrite:
    return CannotWrite(f"{path}: cannot be locked: {error.strerror}", "name a folder on another disk.")
