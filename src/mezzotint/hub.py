"""The Hugging Face Hub as read-only paths: listed by one request, read by byte ranges, downloaded only on `fetch`.

A HubPath does what the readers of headers ask of a pathlib.Path. Endpoint, cache, token and offline mode are those of
huggingface_hub (HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE). Small text files come by way of its cache.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import total_ordering
from pathlib import Path, PurePosixPath
from typing import Any

from mezzotint.errors import BrokenFile, NotACheckpoint

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<path>(/[^/@]+)*)/?(@(?P<revision>[^@]+))?")
FIRST_READ = 64 * 1024
"""Bytes that a first range request asks for: most headers of a component's shard fit."""
TIMEOUT = 30


@dataclass(frozen=True)
class Size:
    """What `HubPath.stat` answers."""

    st_size: int


@dataclass(frozen=True)
class Repo:
    """One commit of a repository: `files` is {path: size in bytes}."""

    name: str
    revision: str
    commit: str
    files: Mapping[str, int]


@total_ordering
@dataclass(frozen=True)
class HubPath:
    """A file or folder of a repository; `/` goes down, `fetch` brings a file here."""

    repo: Repo
    path: PurePosixPath = field(default_factory=PurePosixPath)

    def __truediv__(self, part: str) -> "HubPath":
        return HubPath(self.repo, self.path / part)

    def __str__(self) -> str:
        inside = "" if self.path == PurePosixPath() else f"/{self.path}"
        return f"{self.repo.name}{inside}@{self.repo.revision}"

    def __lt__(self, other: "HubPath") -> bool:
        return self.path < other.path

    @property
    def name(self) -> str:
        return self.path.name or self.repo.name.rpartition("/")[2]

    @property
    def parent(self) -> "HubPath":
        return HubPath(self.repo, self.path.parent)

    def is_file(self) -> bool:
        return str(self.path) in self.repo.files

    def is_dir(self) -> bool:
        return any(self.path in PurePosixPath(file).parents for file in self.repo.files)

    def glob(self, pattern: str) -> Iterator["HubPath"]:
        """The files of this folder, and not of those in it, whose names match."""
        for file in map(PurePosixPath, self.repo.files):
            if file.parent == self.path and fnmatchcase(file.name, pattern):
                yield HubPath(self.repo, file)

    def stat(self) -> Size:
        return Size(self.repo.files[str(self.path)])

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.fetch().read_text(encoding=encoding)

    def open(self, _mode: str = "rb", ahead: int = FIRST_READ) -> "io.BufferedReader | Ranges":
        """The file's bytes: of the copy in the cache, or by ranges of at least `ahead` bytes, 0 for what is asked."""
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo.name, str(self.path), revision=self.repo.commit)
        if isinstance(cached, str):
            return Path(cached).open("rb")
        return io.BufferedReader(Ranges(self), ahead) if ahead else Ranges(self)

    def fetch(self) -> Path:
        """The local copy, downloaded into huggingface_hub's cache if it is not there."""
        from huggingface_hub import hf_hub_download

        with _named_errors(str(self)):
            local = Path(hf_hub_download(self.repo.name, str(self.path), revision=self.repo.revision))
        if self.repo.commit not in local.parts:
            raise BrokenFile(f"{self}: the repository changed while it was being read", "run it again.")
        return local


def local_copy(path: Path | HubPath) -> Path:
    """The path itself, or the copy of a Hub file, or of a Hub folder's own files, in huggingface_hub's cache."""
    if isinstance(path, Path):
        return path
    if path.is_file():
        return path.fetch()
    copies = [file.fetch() for file in path.glob("*")]
    if not copies:
        raise NotACheckpoint(f"{path}: no such file or folder")
    return copies[0].parent


class Ranges(io.RawIOBase):
    """A file of the Hub as a stream: every read is one range request."""

    def __init__(self, file: HubPath) -> None:
        self.file, self.position, self.size = file, 0, file.stat().st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        data = _read_range(self.file, self.position, end)
        buffer[: len(data)] = data
        self.position = end
        return len(data)


AnyPath = Path | HubPath
"""Where headers and configurations are read from."""


def hub_path(name: str) -> HubPath | Path | None:
    """The path that an id names, `owner/name[/path][@revision]`; None if `name` cannot be an id.

    In offline mode it is the folder in huggingface_hub's cache.

    Raises  NotACheckpoint if there is no such repository, or no access to it
    """
    match = HUB_ID.fullmatch(name)
    if match is None:
        return None
    from huggingface_hub.constants import is_offline_mode

    revision, inside = match["revision"] or "main", PurePosixPath(match["path"].lstrip("/"))
    if is_offline_mode():
        return _cached_snapshot(match["repo"], revision) / inside
    return HubPath(_list(match["repo"], revision), inside)


def _list(repo: str, revision: str) -> Repo:
    from huggingface_hub import HfApi

    with _named_errors(f"{repo}@{revision}"):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return Repo(repo, revision, str(info.sha), files)


def _cached_snapshot(repo: str, revision: str) -> Path:
    """The folder in which huggingface_hub keeps this revision's files."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    reference = cache / "refs" / revision
    folder = cache / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    if not folder.is_dir():
        raise NotACheckpoint(
            f"{repo}@{revision}: no such file or folder here, and it is not in the cache ({cache.parent})",
            "check the path; HF_HUB_OFFLINE is set: for a repository, load it once while online.",
        )
    return folder


def _read_range(file: HubPath, start: int, end: int) -> bytes:
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import hf_raise_for_status

    url = hf_hub_url(file.repo.name, str(file.path), revision=file.repo.commit)
    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with _named_errors(str(file)), get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:
            raise NotACheckpoint(f"{file}: the server does not answer range requests", "download the file first.")
        data: bytes = response.read()
    if len(data) != end - start:
        raise BrokenFile(f"{file}: the server sent {len(data):,} bytes, expected {end - start:,}", "run it again.")
    return data


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """Errors of the Hub and of the network as errors of Mezzotint."""
    import httpx2
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise NotACheckpoint(f"{what}: is gated on the Hub", "ask for access there, and set HF_TOKEN.") from error
    except (httpx2.HTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise NotACheckpoint(
            f"{what}: no such file or folder here, and the Hub says: {said[0]}",
            "check the name; for a private repository set HF_TOKEN; for what is in the cache set HF_HUB_OFFLINE=1.",
        ) from error
