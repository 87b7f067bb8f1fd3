"""Files: all there, whole, named by the index and by nothing twice, and with the checksums that were recorded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeInt, StringConstraints

from mezzotint.bounded_json import read_object
from mezzotint.errors import CheckpointError, UnexpectedTensor
from mezzotint.formats import Header
from mezzotint.formats.header import header_of_files, index_of, is_file_name, single_of, weight_map, without_variants
from mezzotint.saving.stream import record_of
from mezzotint.schema import Entries, validated
from mezzotint.verifying.findings import Finding, broken, of_error, suspicious

SIDECAR = "mezzotint.json"
SHA256_LENGTH = 64
AGAIN = "download it again, or let --repair do so."


def _file_name(name: str) -> str:
    if not is_file_name(name):
        raise ValueError("is no name of a file in its folder")
    return name


class RecordedShard(Entries):
    """One file as it was when it was written."""

    size: NonNegativeInt
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Record(Entries):
    """What mezzotint.json records, of the entries that are used: {shard: size and checksum}, {what was done: how}."""

    shards: dict[Annotated[str, AfterValidator(_file_name)], RecordedShard] = Field(default_factory=dict)
    transforms: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """A component's files as they lie there.

    headers   {file: its header} of those that can be read
    index     the index's own map {tensor: file name}, None without an index
    record    what mezzotint.json says of them
    findings  what is wrong with them
    """

    folder: Path
    headers: Mapping[Path, Header]
    index: Mapping[str, str] | None
    record: Record
    findings: tuple[Finding, ...]

    @property
    def transforms(self) -> Mapping[str, Any]:
        """What a conversion says it did to the numbers, from mezzotint.json."""
        return self.record.transforms


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
        index = weight_map(index_file)
    except CheckpointError as error:
        problem = error.message.removeprefix(f"{index_file}: ")
        return _read(path, present, None, [broken("index", index_file.name, problem, AGAIN, index_file)])
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
    extra = [
        suspicious("index", file.name, "the index does not name it") for file in sorted(set(present) - set(wanted))
    ]
    return _read(path, [file for file in wanted if file.is_file()], index, [*missing, *extra])


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
    record = _record(folder, found)
    return Files(folder, headers, index, record, tuple(found))


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
    shards = files.record.shards
    return recorded | {file: shards[file.name].sha256 for file in files.headers if file.name in shards}


def recorded_but_absent(files: Files) -> Iterator[Finding]:
    """Shards that mezzotint.json records and that are not there."""
    known = {finding.where for finding in files.findings}
    for name in files.record.shards:
        if name not in known and not (files.folder / name).is_file():
            yield broken("checksums", name, f"{SIDECAR} records it, and it is not there", AGAIN, files.folder / name)


def check_sum(file: Path, sha256: str) -> Iterator[Finding]:
    """The file's content is what was recorded when it was written."""
    found = record_of(file).sha256
    if found != sha256:
        message = f"has SHA-256 {found[:12]}..., and {sha256[:12]}... was recorded"
        yield broken("checksums", file.name, message, f"its bytes have changed; {AGAIN}", file)


def _record(folder: Path, found: list[Finding]) -> Record:
    """What mezzotint.json records; where it cannot be read, that is found, and it records nothing."""
    file = folder / SIDECAR
    if not file.is_file():
        return Record()
    try:
        return validated(Record, read_object(file), file)
    except CheckpointError as error:
        message = error.message.removeprefix(f"{file}: ")
        found.append(suspicious("checksums", SIDECAR, f"cannot be read ({message}): checksums were not compared"))
        return Record()
