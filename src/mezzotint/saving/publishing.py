"""Replace an old folder with a finished one: in one step where the system can, else in two.

Between the two steps the old folder is called `.NAME.replaced`. If the process is killed then,
nothing is at NAME; every run begins with `recover`, which moves the old folder back.
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

from mezzotint.errors import BadRequest
from mezzotint.saving.files import fsync, locked
from mezzotint.saving.places import FindForeign

AT_FDCWD = -100
RENAME_EXCHANGE = 2
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""Error codes of renameat2 where the kernel or the file system cannot exchange two names.

Source: https://man7.org/linux/man-pages/man2/rename.2.html
"""


def replaced_path(path: Path) -> Path:
    """Return the path of an old output between the two steps."""
    return path.with_name(f".{path.name}.replaced")


def recover(path: Path, find_foreign: FindForeign) -> None:
    """Finish the replacement of a killed run.

    The old output is moved back, or removed if the new one is in its place. A folder with foreign
    files is left alone.
    """
    old = replaced_path(path)
    if not old.is_dir():
        return
    with locked(path.parent, wait=True):
        if old.is_symlink() or not old.is_dir() or find_foreign(old):
            return
        if os.path.lexists(path):
            shutil.rmtree(old)
        else:
            old.rename(path)
            fsync(path.parent)


def publish(new: Path, path: Path) -> Path | None:
    """Rename a finished folder or file to `path`, and return where the old folder is now, if any.

    Raises   OSError; `path` is then unchanged, unless moving the old folder back failed as well:
             see `recover`
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
    """Exchange the two names in one step (Linux: renameat2), and return whether the system can."""
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
    old = replaced_path(path)
    if os.path.lexists(old):
        raise BadRequest(
            f"{old}: already exists, but is not an earlier output",
            "move it, and try again.",
        )
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    return old
