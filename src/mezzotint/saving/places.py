"""Where nothing may be written, and what may not be replaced."""

import os
import pwd
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mezzotint.errors import BadRequest, join_names

SHOWN = 8
"""How many names a refusal spells out."""
Strangers = Callable[[Path], Sequence[str]]
"""What of the thing at a path is no part of an earlier output; nothing where all of it may be replaced."""


def true_place(path: Path) -> Path:
    """The path with the links and dots of its folders followed, and its own name kept as it is."""
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def check_place(path: Path, read: Iterable[Path]) -> None:
    """Raise BadRequest if an output at `path` would take the place of what is read, or of a folder that people live in.

    read   files and folders that the output is made from; a new folder may be made inside them, nothing be replaced
    """
    for place, what in _inhabited():
        if _inside(place, path):
            raise _refused(
                path, f"is {what}" if _same(place, path) else f"contains {what} ({place})"
            )
    for source in read:
        if _inside(source.resolve(), path):
            relation = "is" if _same(source, path) else "contains"
            raise _refused(path, f"{relation} what the output is made from ({source})")
        if os.path.lexists(path) and source.is_dir() and _inside(path, source):
            raise _refused(path, f"lies inside what the output is made from ({source})")


def check_replaceable(path: Path, overwrite: bool, file: bool, strangers: Strangers) -> None:
    """Raise BadRequest unless nothing is at `path`, or an earlier output that a file or folder may replace."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise BadRequest(
            f"{path}: is there already", "--overwrite replaces it once the new one is complete."
        )
    if path.is_symlink() or path.is_file() != file:
        kind = (
            "a symbolic link" if path.is_symlink() else "a file" if path.is_file() else "a folder"
        )
        raise BadRequest(f"{path}: is {kind}, and the output is {'a file' if file else 'a folder'}")
    if os.path.ismount(path):
        raise _refused(path, "is the root of a file system")
    if found := strangers(path):
        raise BadRequest(
            f"{path}: cannot be replaced, as it is no earlier output of convert alone; in the way: "
            f"{join_names(found, SHOWN)}",
            "move what you need elsewhere, remove it by hand, or name another output; nothing was written.",
        )


def refuse_to_replace(paths: Iterable[Path], written_here: Callable[[Path], bool]) -> None:
    """Raise BadRequest if something is at one of the paths that `written_here` does not say we have written."""
    there = [path for path in paths if os.path.lexists(path)]
    found = [
        str(path)
        for path in there
        if path.is_symlink() or not (path.is_file() and written_here(path))
    ]
    if found:
        raise BadRequest(
            f"{join_names(found, SHOWN)}: {'is' if len(found) == 1 else 'are'} there, and not written by Mezzotint",
            "name another output, or move what is there; nothing was written.",
        )


def other_files(folder: Path, own: set[str]) -> list[str]:
    """Files of a folder that are not among `own`, and folders in which no file is; paths inside it, in their order."""
    found = []
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        linked = [name for name in folders if (Path(place) / name).is_symlink()]
        found += [
            str(inside / name)
            for name in (*files, *linked)
            if (inside / name).as_posix() not in own
        ]
        if not folders and not files and inside.parts:
            found.append(f"{inside}/")
    return sorted(found)


def _inhabited() -> list[tuple[Path, str]]:
    """Folders that are never an output, and what they are."""
    homes = {
        Path.home(),
        *(Path(user.pw_dir) for user in pwd.getpwall() if user.pw_uid == os.getuid()),
    }
    return [
        (Path.cwd(), "the working folder"),
        *((home, "a home folder") for home in sorted(homes)),
    ]


def _inside(inner: Path, outer: Path) -> bool:
    """Whether `inner` is `outer` or lies in it; either may be absent."""
    return any(_same(place, outer) for place in (inner, *inner.parents))


def _same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


def _refused(path: Path, why: str) -> BadRequest:
    return BadRequest(
        f"{path}: {why}", "name a folder or file of its own as the output; nothing was written."
    )
