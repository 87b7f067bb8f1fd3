"""Detection of the files of an earlier conversion. Only these may be replaced."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mezzotint.builtin import PIPELINE_INDEX
from mezzotint.containers import safetensors
from mezzotint.containers.shard_index import INDEX_SUFFIX
from mezzotint.conversion.provenance import PIPELINE, SIDECAR, STEM, VERSION_KEY
from mezzotint.errors import MezzotintError
from mezzotint.saving import other_files
from mezzotint.untrusted.json import read_object


def unknown_files(path: Path) -> list[str]:
    """Return the files at a path that are not part of an earlier output."""
    if path.is_dir():
        return other_files(path, set(_output_files(path)))
    return [] if _is_output_file(path) else [str(path)]


def _output_files(folder: Path) -> Iterator[str]:
    """Yield the files of an earlier output, a component or a pipeline, as paths in the folder."""
    yield from _component_files(folder, "")
    if (folder / PIPELINE_INDEX).is_file():
        for sidecar in sorted(folder.glob(f"*/{SIDECAR}")):
            yield from _component_files(sidecar.parent, f"{sidecar.parent.name}/")


def _component_files(folder: Path, prefix: str) -> Iterator[str]:
    """Yield mezzotint.json, the files that it names, and the configuration and index."""
    entries = _sidecar(folder)
    if VERSION_KEY not in entries:
        return
    shards = entries.get("shards")
    names = [
        SIDECAR,
        "config.json",
        f"{STEM}{INDEX_SUFFIX}",
        *(shards if isinstance(shards, dict) else ()),
    ]
    yield from (f"{prefix}{name}" for name in names)
    pipeline = entries.get(PIPELINE)
    if prefix and isinstance(pipeline, dict) and isinstance(pipeline.get("files"), list):
        yield from (name for name in pipeline["files"] if isinstance(name, str))


def _sidecar(folder: Path) -> Mapping[str, Any]:
    """Read mezzotint.json. A file that cannot be read marks no file as replaceable."""
    try:
        return read_object(folder / SIDECAR)
    except MezzotintError:
        return {}


def _is_output_file(path: Path) -> bool:
    try:
        return VERSION_KEY in safetensors.CONTAINER.read(path).metadata
    except MezzotintError:
        return False
