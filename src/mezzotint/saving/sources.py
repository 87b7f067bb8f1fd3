"""Files that are read while an output is written: held open, and looked at again before the output has its name."""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from mezzotint.errors import BrokenFile

Stamp = tuple[int, int, int, int, int]
"""Device, inode, size in bytes, times of change of content and of inode in ns."""


class HeldFiles(ExitStack):
    """Files that must stay what they are; an open file keeps its inode, so that no other file can have the number."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[Path, tuple[int, Stamp]] = {}

    def hold(self, files: Iterable[Path]) -> None:
        """Open the files and remember their state; those that are held already stay as they were remembered."""
        for file in files:
            if file not in self._held:
                handle = os.open(file, os.O_RDONLY)
                self.callback(os.close, handle)
                self._held[file] = (handle, _stamp(os.fstat(handle)))

    @property
    def stamps(self) -> list[tuple[str, Stamp]]:
        """Path and state of every file, in the order of paths."""
        return [(str(file), stamp) for file, (_, stamp) in sorted(self._held.items())]

    def check(self) -> None:
        """Raise BrokenFile if a file was written, replaced or removed since it was held."""
        for file, (handle, stamp) in self._held.items():
            there = file.exists() and os.path.samestat(os.fstat(handle), file.stat())
            if not there:
                raise _changed(file, "replaced or removed")
            if _stamp(os.fstat(handle)) != stamp:
                raise _changed(file, "written to, moved or linked")


def _stamp(stat: os.stat_result) -> Stamp:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _changed(file: Path, how: str) -> BrokenFile:
    return BrokenFile(
        f"{file}: was {how} while it was read",
        "the output would be a mixture, and was not written; run it again when the file is complete.",
    )
