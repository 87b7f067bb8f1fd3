"""What an earlier output of `convert` consists of: only that may be replaced."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mezzotint.bounded_json import read_object
from mezzotint.builtin import PIPELINE_INDEX
from mezzotint.converting.provenance import PIPELINE, SIDECAR, STEM, VERSION_KEY
from mezzotint.errors import MezzotintError
from mezzotint.formats.header import INDEX_SUFFIX
from mezzotint.formats.safetensors_file import read_file
from mezzotint.saving import other_files


def strangers(path: Path) -> list[str]:
    """What at a path is no part of an earlier output: names inside a folder, or the file itself."""
    if path.is_dir():
        return other_files(path, set(_own_files(path)))
    return [] if _is_own_file(path) else [str(path)]


def _own_files(folder: Path) -> Iterator[str]:
    """Files of a component that was written here, or of a pipeline that was, as paths inside the folder."""
    yield from _of_component(folder, "")
    if (folder / PIPELINE_INDEX).is_file():
        for sidecar in sorted(folder.glob(f"*/{SIDECAR}")):
            yield from _of_component(sidecar.parent, f"{sidecar.parent.name}/")


def _of_component(folder: Path, prefix: str) -> Iterator[str]:
    """The files that a component's mezzotint.json speaks of, and those that are written beside it."""
    entries = _sidecar(folder)
    if VERSION_KEY not in entries:
        return
    shards = entries.get("shards")
    names = [SIDECAR, "config.json", f"{STEM}{INDEX_SUFFIX}", *(shards if isinstance(shards, dict) else ())]
    yield from (f"{prefix}{name}" for name in names)
    pipeline = entries.get(PIPELINE)
    if prefix and isinstance(pipeline, dict) and isinstance(pipeline.get("files"), list):
        yield from (name for name in pipeline["files"] if isinstance(name, str))


def _sidecar(folder: Path) -> Mapping[str, Any]:
    try:
        return read_object(folder / SIDECAR)
    except MezzotintError:
        return {}


def _is_own_file(path: Path) -> bool:
    try:
        return VERSION_KEY in read_file(path)[1]
    except MezzotintError:
        return False
