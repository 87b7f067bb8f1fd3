"""A finished folder takes the place of an old one: in one step where the system can, else in two that can be undone.

Between the two steps the old folder is called `.NAME.replaced`. If the process is killed there, nothing has the name;
`recover`, with which every run begins, gives it back to the old folder.
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

from mezzotint.errors import BadRequest
from mezzotint.saving.files import fsync, locked
from mezzotint.saving.places import Strangers

AT_FDCWD = -100
RENAME_EXCHANGE = 2
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""What renameat2 says where kernel or file system cannot exchange two names."""


def aside(path: Path) -> Path:
    """Where an old output is between the two steps."""
    return path.with_name(f".{path.name}.replaced")


def recover(path: Path, strangers: Strangers) -> None:
    """Finish what a killed run has begun: give an old output its name back, or remove it if a new one has the name.

    A folder of that name that is no earlier output is left alone.
    """
    old = aside(path)
    if not old.is_dir():
        return
    with locked(path.parent, wait=True):
        if old.is_symlink() or not old.is_dir() or strangers(old):
            return
        if os.path.lexists(path):
            shutil.rmtree(old)
        else:
            old.rename(path)
            fsync(path.parent)


def put_in_place(new: Path, path: Path) -> Path | None:
    """Give a finished folder or file its name; returns where the old folder is now, None if there was none.

    Raises   OSError; `path` is then what it was, unless even the way back failed: see `recover`
    """
    if new.is_file():
        new.replace(path)
    elif not path.exists():
        new.rename(path)
    elif _exchanged(new, path):
        return new
    else:
        return _in_two_steps(new, path)
    return None


def _exchanged(new: Path, old: Path) -> bool:
    """Whether the two names were swapped in one step (Linux: renameat2); False where that is not to be had."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code not in NO_EXCHANGE:
        raise OSError(code, os.strerror(code), str(old))
    return False


def _in_two_steps(new: Path, path: Path) -> Path:
    old = aside(path)
    if os.path.lexists(old):
        raise BadRequest(
            f"{old}: is in the way, and no earlier output", "move it elsewhere, and run it again."
        )
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    return old
