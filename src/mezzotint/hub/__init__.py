"""Read-only paths on the Hugging Face Hub.

A repository is listed with one request, and its files are read by byte ranges. Only `fetch`
downloads a file. A HubPath has the methods of pathlib.Path that reading headers needs. As in
huggingface_hub, HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE set endpoint, cache, token and
offline mode.
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
"""Bytes of the first range request, enough for most headers of a component's shard."""
LISTING_BYTES = 8 * 2**20
"""Largest accepted listing of a repository, enough for 30,000 files."""
COMMIT = re.compile("[0-9a-f]{40,64}")


@dataclass(frozen=True)
class FileStat:
    """Result of `HubPath.stat`; the size is in bytes."""

    st_size: int


@dataclass(frozen=True)
class Repo:
    """One commit of a repository.

    files   {path: size in bytes}
    starts  {path: first bytes of the file}, cached because detecting and reading both need them
    """

    name: str
    revision: str
    commit: str
    files: Mapping[str, int]
    starts: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)


@total_ordering
@dataclass(frozen=True)
class HubPath:
    """A file or folder of a repository; `/` joins paths, `fetch` downloads a file."""

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
        """Yield the files of this folder, without subfolders, whose names match."""
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
        """Open the cached copy, or the file on the Hub.

        read_ahead   fewest bytes that a range request asks for; 0 to ask for exactly what is read
        """
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo.name, str(self.path), revision=self.repo.commit)
        if isinstance(cached, str):
            return Path(cached).open("rb")
        return io.BufferedReader(RangeReader(self), read_ahead) if read_ahead else RangeReader(self)

    def fetch(self, **options: Any) -> Path:
        """Download the file into huggingface_hub's cache if necessary, and return the local copy.

        options   further arguments of `hf_hub_download`
        Raises    NotACheckpoint if the file does not exist; HubError;
                  BrokenFile if the repository has changed
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
    """Return a local path: the path itself, or the cached copy of a Hub file or folder.

    Files in subfolders of a Hub folder are not downloaded.

    Raises   NotACheckpoint if there is no such file or folder; HubError
    """
    if isinstance(path, Path):
        return path
    if path.is_file():
        return path.fetch()
    copies = [file.fetch() for file in path.glob("*")]
    if not copies:
        raise NotACheckpoint(f"{path}: no such file or folder")
    return copies[0].parent


class RangeReader(io.RawIOBase):
    """A file on the Hub as a stream; every read is one range request."""

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
        """Return the bytes from the position to `end` if the file's first bytes are cached.

        A read from position 0 fills the cache.
        """
        starts, path = self.file.repo.starts, str(self.file.path)
        if self.position == 0 and end > len(starts.get(path, b"")):
            starts[path] = _read_range(self.file, 0, end)
        start = starts.get(path, b"")
        return start[self.position : end] if end <= len(start) else None


AnyPath = Path | HubPath
"""A local path or a path on the Hub."""


def hub_path(name: str) -> HubPath | Path | None:
    """Return the path of an id `owner/name[/path][@revision]`, or None if `name` is not a valid id.

    In offline mode, return the folder in huggingface_hub's cache.

    Raises   NotACheckpoint if there is no such repository, or no access to it; HubError
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
    """Return the commit of `revision`, with its files and their sizes.

    Raises   NotACheckpoint if there is no such repository or no access to it; HubError
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
    """Return whether a path stays inside its repository, and can be printed and opened."""
    parts = name.split("/")
    inside = len(name) <= 1024 and not {"", ".", ".."} & set(parts) and "\\" not in name
    return inside and not any(unicodedata.category(c) in {"Cc", "Cs"} for c in name)


def _no_listing(what: str, why: str) -> HubError:
    return HubError(f"{what}: the Hub's list of files {why}", CHECK_ENDPOINT)


def _cached_snapshot(repo: str, revision: str) -> Path:
    """Return the folder of this revision in huggingface_hub's cache."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    reference = cache / "refs" / revision
    folder = (
        cache / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    )
    if not folder.is_dir():
        raise NotACheckpoint(
            f"{repo}@{revision}: no such local file or folder, and the repository is not in "
            f"the cache ({cache.parent})",
            "check the path; HF_HUB_OFFLINE is set: load a repository once while online.",
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
                f"{file}: the server does not support range requests", "download the file first."
            )
        sent = response.headers.get("Content-Range")
        if sent is not None and not re.match(rf"bytes {start}-{end - 1}/", sent):
            raise HubError(
                f"{file}: asked for bytes {start}-{end - 1}, the Hub sends {sent}", CHECK_ENDPOINT
            )
        data = response.read()
    if len(data) != end - start:
        raise httpx2.RemoteProtocolError(f"received {len(data):,} of {end - start:,} bytes")
    return data
