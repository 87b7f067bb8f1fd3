"""Fetch broken files again from the Hub, where the folder came from there."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mezzotint.errors import MezzotintError
from mezzotint.hub import HubPath, list_files

REPOSITORY = "models--"
SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Origin:
    """Where in huggingface_hub's cache a file lies, and so where it came from."""

    cache: Path
    repository: str
    revision: str
    name: str


@dataclass(frozen=True)
class Repair:
    """What became of one file; `reason` says why it was not fetched, or is empty."""

    file: str
    fetched: bool
    reason: str = ""


def origin_of(file: Path) -> Origin | None:
    """The file's origin if its path is CACHE/models--OWNER--NAME/snapshots/REVISION/..., else None."""
    parts = file.absolute().parts
    for i, part in enumerate(parts[:-3]):
        if part.startswith(REPOSITORY) and parts[i + 1] == SNAPSHOTS:
            repository = part.removeprefix(REPOSITORY).replace("--", "/")
            return Origin(Path(*parts[:i]), repository, parts[i + 2], "/".join(parts[i + 3 :]))
    return None


def fetch_again(files: Iterable[Path]) -> list[Repair]:
    """Download each file again at the revision it came from; a file whose origin is not known is said so."""
    return [_fetch(file) for file in dict.fromkeys(files)]


def _fetch(file: Path) -> Repair:
    origin = origin_of(file)
    if origin is None:
        return Repair(file.name, False, "its folder is not one of huggingface_hub's cache, so its origin is not known")
    try:
        repository = list_files(origin.repository, origin.revision)
        remote = HubPath(repository, PurePosixPath(origin.name))
        if not remote.is_file():
            return Repair(file.name, False, f"{origin.repository}@{origin.revision}: has no file {origin.name}")
        remote.fetch(cache_dir=origin.cache, force_download=True)
    except MezzotintError as error:
        return Repair(file.name, False, error.message)
    return Repair(file.name, True)
