"""Detect changes to the input files while an output is written."""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from mezzotint.errors import BrokenFile

Stamp = tuple[int, int, int, int, int]
"""Device, inode, size in bytes, mtime and ctime in ns."""


class WatchedFiles(ExitStack):
    """Files that must not change, kept open so that their inode numbers are not reused."""

    def __init__(self) -> None:
        super().__init__()
        self._watched: dict[Path, tuple[int, Stamp]] = {}

    def watch(self, files: Iterable[Path]) -> None:
        """Open the files and record their state; a file's first recorded state is kept."""
        for file in files:
            if file not in self._watched:
                handle = os.open(file, os.O_RDONLY)
                self.callback(os.close, handle)
                self._watched[file] = (handle, _stamp(os.fstat(handle)))

    @property
    def stamps(self) -> list[tuple[str, Stamp]]:
        """Path and state of every file, sorted by path."""
        return [(str(file), stamp) for file, (_, stamp) in sorted(self._watched.items())]

    def check(self) -> None:
        """Raise BrokenFile if a file was written, replaced or removed since `watch`."""
        for file, (handle, stamp) in self._watched.items():
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
        "no output was written, as it would mix old and new data; try again with a complete file.",
    )
