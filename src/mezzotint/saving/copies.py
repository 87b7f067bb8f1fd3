"""Copies of files that share nothing with the original that could be changed through them."""

import errno
import fcntl
import shutil
from pathlib import Path

FICLONE = 0x40049409
"""Linux's request to let a file share another's blocks until either is written (btrfs, XFS, ZFS)."""
NO_CLONES = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)
"""What FICLONE says where the file system cannot do it."""


def clone_file(source: Path, target: Path) -> bool:
    """Whether `target` is now a clone of `source`, which takes no space; where that cannot be, nothing is left."""
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
    """Copy a file's content; returns its size in bytes."""
    shutil.copyfile(source, target)
    return target.stat().st_size
