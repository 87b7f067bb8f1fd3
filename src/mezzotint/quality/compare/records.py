"""Records: JSON files with checksums, so that damaged results are detected and never reused.

A record is a JSON object whose entry `sha256` is the digest of all other entries. Its entry `files`
is optional and maps file paths, relative to the record's folder, to their SHA-256.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mezzotint.saving import atomic_write
from mezzotint.saving.stream import hash_file

SHA256, FILES = "sha256", "files"
MAX_BYTES = 2**24
"""Largest record that is read; a typical record has a few thousand bytes."""


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, entries: Mapping[str, Any], files: Iterable[Path] = ()) -> None:
    """Write a record with the checksums of `files`, which are in its folder or below."""
    if files := list(files):
        entries = {**entries, FILES: {_name(file, path): hash_file(file).sha256 for file in files}}
    with atomic_write(path) as temporary:
        text = json.dumps({**entries, SHA256: digest(entries)}, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any] | None:
    """Return a record's entries, or None if the record is absent or damaged."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return None
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(entries, dict):
        return None
    return entries if entries.pop(SHA256, None) == digest(entries) else None


def has_its_files(path: Path, entries: Mapping[str, Any]) -> bool:
    """Return whether every file of the record at `path` exists with the recorded checksum."""
    files = {path.parent / name: sha256 for name, sha256 in entries.get(FILES, {}).items()}
    return all(
        file.is_file() and hash_file(file).sha256 == sha256 for file, sha256 in files.items()
    )


def remove(path: Path) -> None:
    """Remove a file, a folder or a link. Do nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _name(file: Path, record: Path) -> str:
    return file.relative_to(record.parent).as_posix()
