"""Files that are believed only if they are what was written: JSON with its own SHA-256, and those of files beside it.

A record is a JSON object whose `sha256` is the digest of all its other entries. Where `files` is among them, it holds
the SHA-256 of each file that the record speaks for, by its path from the folder that the record is in.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mezzotint.saving import whole_file
from mezzotint.saving.stream import record_of

SHA256, FILES = "sha256", "files"
LARGEST = 2**24
"""Bytes of a record that are read; ours have a few thousand."""


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON, its keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, entries: Mapping[str, Any], files: Iterable[Path] = ()) -> None:
    """Write a record that speaks for these files of its folder, or of folders in it."""
    if files := list(files):
        entries = {**entries, FILES: {_name(file, path): record_of(file).sha256 for file in files}}
    with whole_file(path) as temporary:
        text = json.dumps({**entries, SHA256: digest(entries)}, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any] | None:
    """Return a record's entries, or None if there is none or it is not what was written."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return None
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(entries, dict):
        return None
    return entries if entries.pop(SHA256, None) == digest(entries) else None


def has_its_files(path: Path, entries: Mapping[str, Any]) -> bool:
    """Return whether every file that the record at `path` speaks for is what was written."""
    files = {path.parent / name: sha256 for name, sha256 in entries.get(FILES, {}).items()}
    return all(file.is_file() and record_of(file).sha256 == sha256 for file, sha256 in files.items())


def remove(path: Path) -> None:
    """Remove what is at a path, be it a file, a folder, a link, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _name(file: Path, record: Path) -> str:
    return file.relative_to(record.parent).as_posix()
