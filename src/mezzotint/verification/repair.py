"""Repair of broken files: download them again, if they came from the Hub."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mezzotint.errors import MezzotintError
from mezzotint.hub import HubPath, list_files

REPOSITORY = "models--"
SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Origin:
    """The repository, revision and name of a file in huggingface_hub's cache."""

    cache: Path
    repository: str
    revision: str
    name: str


@dataclass(frozen=True)
class Repair:
    """The result for one file. `reason` explains why it was not downloaded, or is empty."""

    file: str
    fetched: bool
    reason: str = ""


def hub_origin(file: Path) -> Origin | None:
    """Return a file's origin if its path is CACHE/models--OWNER--NAME/snapshots/REVISION/...

    Return None for other paths.
    """
    parts = file.absolute().parts
    for i, part in enumerate(parts[:-3]):
        if part.startswith(REPOSITORY) and parts[i + 1] == SNAPSHOTS:
            repository = part.removeprefix(REPOSITORY).replace("--", "/")
            return Origin(Path(*parts[:i]), repository, parts[i + 2], "/".join(parts[i + 3 :]))
    return None


def repair_files(files: Iterable[Path]) -> list[Repair]:
    """Download each file again, at its revision. Files of unknown origin get a reason instead."""
    return [_fetch(file) for file in dict.fromkeys(files)]


def _fetch(file: Path) -> Repair:
    origin = hub_origin(file)
    if origin is None:
        return Repair(
            file.name,
            False,
            "its folder is not in huggingface_hub's cache, so its origin is unknown",
        )
    try:
        repository = list_files(origin.repository, origin.revision)
        remote = HubPath(repository, PurePosixPath(origin.name))
        if not remote.is_file():
            return Repair(
                file.name,
                False,
                f"{origin.repository}@{origin.revision} has no file {origin.name}",
            )
        remote.fetch(cache_dir=origin.cache, force_download=True)
    except MezzotintError as error:
        return Repair(file.name, False, error.message)
    return Repair(file.name, True)
