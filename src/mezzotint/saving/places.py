"""Check that an output replaces neither its inputs nor files that Mezzotint did not write."""

import os
import pwd
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mezzotint.errors import BadRequest, join_names

SHOWN = 8
"""File names that a message lists."""
FindForeign = Callable[[Path], Sequence[str]]
"""Returns the files at a path that belong to no earlier output; empty if all may be replaced."""


def resolve_parent(path: Path) -> Path:
    """Resolve the links and dots in a path's folders, but keep its last part as it is."""
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def check_place(path: Path, read: Iterable[Path]) -> None:
    """Check that an output at `path` replaces no input, no home folder and no working folder.

    read     files and folders that the output is made from; a new output may be created inside
             them, but may replace nothing there
    Raises   BadRequest
    """
    for place, what in _protected_folders():
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


def check_replaceable(path: Path, overwrite: bool, file: bool, find_foreign: FindForeign) -> None:
    """Check that `path` does not exist, or is an earlier output that may be replaced.

    file     the output is a file, not a folder
    Raises   BadRequest
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise BadRequest(
            f"{path}: already exists", "--overwrite replaces it once the new one is complete."
        )
    if path.is_symlink() or path.is_file() != file:
        kind = (
            "a symbolic link" if path.is_symlink() else "a file" if path.is_file() else "a folder"
        )
        raise BadRequest(f"{path}: is {kind}, and the output is {'a file' if file else 'a folder'}")
    if os.path.ismount(path):
        raise _refused(path, "is the root of a file system")
    if found := find_foreign(path):
        raise BadRequest(
            f"{path}: cannot be replaced, because it holds files that convert did not write: "
            f"{join_names(found, SHOWN)}",
            "move or remove them, or name another output; nothing was written.",
        )


def refuse_to_replace(paths: Iterable[Path], written_here: Callable[[Path], bool]) -> None:
    """Check that Mezzotint wrote every file that exists at one of the paths.

    written_here   returns whether Mezzotint wrote a file
    Raises         BadRequest
    """
    existing = [path for path in paths if os.path.lexists(path)]
    found = [
        str(path)
        for path in existing
        if path.is_symlink() or not (path.is_file() and written_here(path))
    ]
    if found:
        raise BadRequest(
            f"{join_names(found, SHOWN)}: already {'exists' if len(found) == 1 else 'exist'}, "
            f"and {'was' if len(found) == 1 else 'were'} not written by Mezzotint",
            "name another output, or move the existing file; nothing was written.",
        )


def other_files(folder: Path, known: set[str]) -> list[str]:
    """Return the files of a folder that are not in `known`, and its empty folders.

    known     paths relative to the folder
    Returns   relative paths, sorted
    """
    found = []
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        linked = [name for name in folders if (Path(place) / name).is_symlink()]
        found += [
            str(inside / name)
            for name in (*files, *linked)
            if (inside / name).as_posix() not in known
        ]
        if not folders and not files and inside.parts:
            found.append(f"{inside}/")
    return sorted(found)


def _protected_folders() -> list[tuple[Path, str]]:
    """Return the folders that an output may never replace, and what they are."""
    homes = {
        Path.home(),
        *(Path(user.pw_dir) for user in pwd.getpwall() if user.pw_uid == os.getuid()),
    }
    return [
        (Path.cwd(), "the working folder"),
        *((home, "a home folder") for home in sorted(homes)),
    ]


def _inside(inner: Path, outer: Path) -> bool:
    """Return whether `inner` is `outer` or lies in it; either may be absent."""
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
