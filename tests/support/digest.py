"""Checksums of a folder."""

import hashlib
from pathlib import Path


def digest(folder: Path) -> dict[str, str]:
    """Return {path inside the folder: SHA-256}."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in folder.rglob("*")
        if f.is_file()
    }
