"""Copy files so that a change to the copy never changes the original."""

import errno
import fcntl
import shutil
from pathlib import Path

FICLONE = 0x40049409
"""Linux ioctl that shares a file's blocks until either file is written (btrfs, XFS, ZFS).

Source: https://man7.org/linux/man-pages/man2/ioctl_ficlonerange.2.html
"""
NO_CLONES = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)
"""Error codes of FICLONE on file systems that cannot clone."""


def clone_file(source: Path, target: Path) -> bool:
    """Make `target` a clone of `source`, which takes no space, and return whether that worked.

    Where the file system cannot clone, `target` does not exist afterwards.
    """
    with source.open("rb") as original, target.open("wb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), FICLONE, original.fileno())
        except OSError as error:
            if error.errno not in NO_CLONES:
                raise
        else:
            return True
    target.unlink()
    return False


def copy_bytes(source: Path, target: Path) -> int:
    """Copy a file's content and return its size in bytes."""
    shutil.copyfile(source, target)
    return target.stat().st_size
