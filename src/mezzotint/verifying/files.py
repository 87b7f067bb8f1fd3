"""Files: all there, whole, named by the index and by nothing twice, and with the checksums that were recorded."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.errors import CheckpointError, UnexpectedTensor
from mezzotint.formats import Header
from mezzotint.formats.header import header_of_files, index_of, single_of, without_variants
from mezzotint.saving.stream import record_of
from mezzotint.verifying.findings import Finding, broken, of_error, suspicious

SIDECAR = "mezzotint.json"
SHA256_LENGTH = 64
AGAIN = "download it again, or let --repair do so."


@dataclass(frozen=True)
class Files:
    """A component's files as they lie there.

    headers   {file: its header} of those that can be read
    index     the index's own map {tensor: file name}, None without an index
    findings  what is wrong with them
    """

    folder: Path
    headers: Mapping[Path, Header]
    index: Mapping[str, str] | None
    findings: tuple[Finding, ...]

    @property
    def transforms(self) -> Mapping[str, Any]:
        """What a conversion says it did to the numbers, from mezzotint.json."""
        entries = _sidecar(self.folder).get("transforms", {})
        return entries if isinstance(entries, dict) else {}


def look_at_files(path: Path) -> Files:
    """Read every header on its own, so that one broken file does not hide another."""
    if path.is_file():
        return _read(path.parent, [path], None, [])
    kept, _ = without_variants(sorted(path.glob("*.safetensors")))
    present = [path / file.name for file in kept]
    found = index_of(path, present)
    index_file = None if found is None else path / found.name
    if index_file is None:
        return _read(path, present, None, [])
    try:
        index = _weight_map(index_file)
    except ValueError as error:
        problem = broken("index", index_file.name, f"is no index of shards ({error})", AGAIN, index_file)
        return _read(path, present, None, [problem])
    wanted = [path / name for name in sorted(set(index.values()))]
    missing = [
        broken("index", file.name, "the index names it, and it is not there", AGAIN, file)
        for file in wanted
        if not file.is_file()
    ]
    single = path / single_of(index_file)
    if missing and single in present:
        stale = suspicious(
            "index", index_file.name, f"names shards that are not there, beside a complete {single.name}"
        )
        return _read(path, [single], None, [stale])
    extra = [suspicious("index", file.name, "the index does not name it") for file in present if file not in wanted]
    return _read(path, [file for file in wanted if file.is_file()], index, [*missing, *extra])


def _weight_map(index: Path) -> dict[str, str]:
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    weight_map = entries.get("weight_map") if isinstance(entries, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("it has no weight_map")
    if any(not isinstance(name, str) or Path(name).name != name for name in weight_map.values()):
        raise ValueError("it names a shard by what is no name of a file in its folder")
    return weight_map


def _read(folder: Path, files: Sequence[Path], index: Mapping[str, str] | None, found: list[Finding]) -> Files:
    headers: dict[Path, Header] = {}
    for file in files:
        try:
            headers[file] = header_of_files(file, [file], folder)
        except UnexpectedTensor as error:
            found.append(of_error("duplicates", file.name, error, file))
        except CheckpointError as error:
            found.append(of_error("header", file.name, error, file))
    found += _duplicates(headers)
    if index is not None:
        found += _index_against_shards(index, headers)
    return Files(folder, headers, index, tuple(found))


def _duplicates(headers: Mapping[Path, Header]) -> Iterator[Finding]:
    first: dict[str, Path] = {}
    for file, header in headers.items():
        for key in header.tensors:
            if key in first:
                yield broken("duplicates", key, f"is stored twice: in {first[key].name} and in {file.name}")
            first.setdefault(key, file)


def _index_against_shards(index: Mapping[str, str], headers: Mapping[Path, Header]) -> Iterator[Finding]:
    stored = {file.name: header.tensors for file, header in headers.items()}
    for key, name in index.items():
        if name in stored and key not in stored[name]:
            yield broken("index", key, f"the index says that it is in {name}, and it is not")
    for name, tensors in stored.items():
        for key in tensors:
            if key not in index:
                yield suspicious("index", key, f"is in {name}, and the index does not name it")


def recorded_checksums(files: Files) -> dict[Path, str]:
    """{file: SHA-256 in hex} from mezzotint.json, or from the names that the Hub's cache gives its files."""
    recorded = {}
    for file in files.headers:
        blob = file.resolve().name
        if file.is_symlink() and len(blob) == SHA256_LENGTH and set(blob) <= set("0123456789abcdef"):
            recorded[file] = blob
    shards = _sidecar(files.folder).get("shards", {})
    if isinstance(shards, dict):
        for file in files.headers:
            entry = shards.get(file.name)
            if isinstance(entry, dict):
                recorded[file] = str(entry.get("sha256"))
    return recorded


def recorded_but_absent(files: Files) -> Iterator[Finding]:
    """Shards that mezzotint.json records and that are not there."""
    shards = _sidecar(files.folder).get("shards", {})
    known = {finding.where for finding in files.findings}
    for name in shards if isinstance(shards, dict) else ():
        if name not in known and not (files.folder / name).is_file():
            yield broken("checksums", name, f"{SIDECAR} records it, and it is not there", AGAIN, files.folder / name)


def check_sum(file: Path, sha256: str) -> Iterator[Finding]:
    """The file's content is what was recorded when it was written."""
    found = record_of(file).sha256
    if found != sha256:
        message = f"has SHA-256 {found[:12]}..., and {sha256[:12]}... was recorded"
        yield broken("checksums", file.name, message, f"its bytes have changed; {AGAIN}", file)


def _sidecar(folder: Path) -> Mapping[str, Any]:
    file = folder / SIDECAR
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}
