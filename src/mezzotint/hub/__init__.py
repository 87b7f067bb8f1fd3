"""The Hugging Face Hub as read-only paths: listed by one request, read by byte ranges, downloaded only on `fetch`.

A HubPath does what the readers of headers ask of a pathlib.Path. Endpoint, cache, token and offline mode are those of
huggingface_hub (HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE). Small text files come by way of its cache.
"""

import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial, total_ordering
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from mezzotint.errors import BrokenFile, HubError, NotACheckpoint
from mezzotint.hub.errors import CHECK_ENDPOINT, SHOWN, printable
from mezzotint.hub.http import call, open_stream

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<path>(/[^/@]+)*)/?(@(?P<revision>[^@]+))?")
FIRST_READ = 64 * 1024
"""Bytes that a first range request asks for: most headers of a component's shard fit."""
LISTING_BYTES = 8 * 2**20
"""Largest list of a repository's files: 30,000 of them."""
COMMIT = re.compile("[0-9a-f]{40,64}")


@dataclass(frozen=True)
class FileStat:
    """What `HubPath.stat` answers."""

    st_size: int


@dataclass(frozen=True)
class Repo:
    """One commit of a repository.

    files   {path: size in bytes}
    starts  {path: first bytes of the file}, kept because a file is recognized and then read
    """

    name: str
    revision: str
    commit: str
    files: Mapping[str, int]
    starts: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)


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

    def stat(self) -> FileStat:
        return FileStat(self.repo.files[str(self.path)])

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.fetch().read_text(encoding=encoding)

    def open(
        self, _mode: str = "rb", read_ahead: int = FIRST_READ
    ) -> "io.BufferedReader | RangeReader":
        """The file's bytes: of the copy in the cache, or by ranges of at least `ahead` bytes, 0 for what is asked."""
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo.name, str(self.path), revision=self.repo.commit)
        if isinstance(cached, str):
            return Path(cached).open("rb")
        return io.BufferedReader(RangeReader(self), read_ahead) if read_ahead else RangeReader(self)

    def fetch(self, **options: Any) -> Path:
        """Return the local copy, downloaded into huggingface_hub's cache if it is not there.

        options  further arguments of `hf_hub_download`
        """
        from huggingface_hub import hf_hub_download

        size = self.repo.files.get(str(self.path))
        if size is None:
            raise NotACheckpoint(f"{self}: no such file", "check the name.")
        download = partial(
            hf_hub_download,
            self.repo.name,
            str(self.path),
            revision=self.repo.revision,
            headers={"Accept-Encoding": "identity"},
            **options,
        )
        local = Path(call(str(self), size, download))
        if self.repo.commit not in local.parts:
            raise BrokenFile(
                f"{self}: the repository changed while it was being read", "run it again."
            )
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


class RangeReader(io.RawIOBase):
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
        data = self._read_start(end) if end <= FIRST_READ else None
        if data is None:
            data = _read_range(self.file, self.position, end)
        buffer[: len(data)] = data
        self.position = end
        return len(data)

    def _read_start(self, end: int) -> bytes | None:
        """Return bytes up to `end` if they are the file's first; each file is asked once."""
        starts, path = self.file.repo.starts, str(self.file.path)
        if self.position == 0 and end > len(starts.get(path, b"")):
            starts[path] = _read_range(self.file, 0, end)
        start = starts.get(path, b"")
        return start[self.position : end] if end <= len(start) else None


AnyPath = Path | HubPath
"""Where headers and configurations are read from."""


def hub_path(name: str) -> HubPath | Path | None:
    """The path that an id names, `owner/name[/path][@revision]`; None if `name` cannot be an id.

    In offline mode it is the folder in huggingface_hub's cache.

    Raises  NotACheckpoint if there is no such repository, or no access to it; HubError if the Hub fails
    """
    match = HUB_ID.fullmatch(name)
    if match is None:
        return None
    from huggingface_hub.constants import is_offline_mode

    revision, inside = match["revision"] or "main", PurePosixPath(match["path"].lstrip("/"))
    if is_offline_mode():
        return _cached_snapshot(match["repo"], revision) / inside
    return HubPath(list_files(match["repo"], revision), inside)


def list_files(repo: str, revision: str) -> Repo:
    """Return the commit that `revision` names, with its files and their sizes.

    Raises  NotACheckpoint if there is no such repository or no access to it; HubError
    """
    what = f"{repo}@{revision}"
    text = call(what, LISTING_BYTES, partial(_get_listing, repo, revision))
    try:
        listing = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_listing(what, "is not JSON") from error
    if not isinstance(listing, dict) or not isinstance(listing.get("siblings"), list):
        raise _no_listing(what, "has no files")
    commit = listing.get("sha")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise _no_listing(what, "names no commit")
    return Repo(
        repo, revision, commit, dict(_file_entry(what, entry) for entry in listing["siblings"])
    )


def _get_listing(repo: str, revision: str) -> bytes:
    from huggingface_hub import constants
    from huggingface_hub.utils._validators import validate_repo_id

    validate_repo_id(repo)
    url = f"{constants.ENDPOINT}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    with open_stream(url) as response:
        return response.read()


def _file_entry(what: str, entry: Any) -> tuple[str, int]:
    match entry:
        case {"rfilename": str(name), "size": int(size)} if size >= 0 and _is_safe(name):
            return name, size
    raise _no_listing(what, f"has the unusable entry {printable(repr(entry)[:SHOWN])}")


def _is_safe(name: str) -> bool:
    """Whether a path stays inside its repository, and can be printed and opened."""
    parts = name.split("/")
    inside = len(name) <= 1024 and not {"", ".", ".."} & set(parts) and "\\" not in name
    return inside and not any(unicodedata.category(c) in {"Cc", "Cs"} for c in name)


def _no_listing(what: str, why: str) -> HubError:
    return HubError(f"{what}: the Hub's list of files {why}", CHECK_ENDPOINT)


def _cached_snapshot(repo: str, revision: str) -> Path:
    """The folder in which huggingface_hub keeps this revision's files."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    reference = cache / "refs" / revision
    folder = (
        cache / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    )
    if not folder.is_dir():
        raise NotACheckpoint(
            f"{repo}@{revision}: no such file or folder here, and it is not in the cache ({cache.parent})",
            "check the path; HF_HUB_OFFLINE is set: for a repository, load it once while online.",
        )
    return folder


def _read_range(file: HubPath, start: int, end: int) -> bytes:
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(file.repo.name, str(file.path), revision=file.repo.commit)
    return call(str(file), end - start, partial(_get_range, file, url, start, end))


def _get_range(file: HubPath, url: str, start: int, end: int) -> bytes:
    import httpx2

    with open_stream(url, Range=f"bytes={start}-{end - 1}") as response:
        whole = start == 0 and end == file.stat().st_size
        if response.status_code != 206 and not (response.status_code == 200 and whole):
            raise NotACheckpoint(
                f"{file}: the server does not answer range requests", "download the file first."
            )
        sent = response.headers.get("Content-Range")
        if sent is not None and not re.match(rf"bytes {start}-{end - 1}/", sent):
            raise HubError(
                f"{file}: asked for bytes {start}-{end - 1}, the Hub sends {sent}", CHECK_ENDPOINT
            )
        data = response.read()
    if len(data) != end - start:
        raise httpx2.RemoteProtocolError(f"{len(data):,} of {end - start:,} bytes came")
    return data
