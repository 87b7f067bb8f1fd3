"""Checks of files: all present, complete, consistent with the index, and with correct checksums."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeInt, StringConstraints

from mezzotint.containers.shard_index import index_of, is_file_name, single_of, weight_map
from mezzotint.errors import CheckpointError, UnexpectedTensor
from mezzotint.formats import Header
from mezzotint.formats.header import header_of_files
from mezzotint.formats.weight_files import list_weight_files, without_variants
from mezzotint.saving.stream import hash_file
from mezzotint.untrusted.json import read_object
from mezzotint.untrusted.schema import Entries, validated
from mezzotint.verification.findings import Finding, broken, finding_from_error, suspicious

SIDECAR = "mezzotint.json"
SHA256_LENGTH = 64
DOWNLOAD_AGAIN = "download it again, or let --repair do so."


def _file_name(name: str) -> str:
    if not is_file_name(name):
        raise ValueError("is not a file name")
    return name


class RecordedShard(Entries):
    """The size and checksum of one file when it was written."""

    size: NonNegativeInt
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Record(Entries):
    """The used entries of mezzotint.json.

    shards       {file name: size and checksum}
    transforms   {transformation of values by a conversion: number of layers}
    """

    shards: dict[Annotated[str, AfterValidator(_file_name)], RecordedShard] = Field(
        default_factory=dict
    )
    transforms: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """The files of a component.

    headers   {file: header} of the readable files
    index     {tensor: file name} from the index file; None without an index
    record    content of mezzotint.json
    findings  faults of the files
    """

    folder: Path
    headers: Mapping[Path, Header]
    index: Mapping[str, str] | None
    record: Record
    findings: tuple[Finding, ...]

    @property
    def transforms(self) -> Mapping[str, Any]:
        """Return the transformations of values by a conversion, from mezzotint.json."""
        return self.record.transforms


def read_files(path: Path) -> Files:
    """Read each header separately, so that one broken file does not hide another."""
    if path.is_file():
        return _read(path.parent, [path], None, [])
    files, _ = without_variants(list_weight_files(path))
    present = [path / file.name for file in files]
    index = index_of(path, present)
    if index is None:
        return _read(path, present, None, [])
    return _read_indexed(path, present, path / index.name)


def _read_indexed(folder: Path, present: Sequence[Path], index_file: Path) -> Files:
    try:
        index = weight_map(index_file)
    except CheckpointError as error:
        problem = error.message.removeprefix(f"{index_file}: ")
        unreadable = broken("index", index_file.name, problem, DOWNLOAD_AGAIN, index_file)
        return _read(folder, present, None, [unreadable])
    indexed = [folder / name for name in sorted(set(index.values()))]
    missing = [
        broken("index", file.name, "the index names it, and it is missing", DOWNLOAD_AGAIN, file)
        for file in indexed
        if not file.is_file()
    ]
    single = folder / single_of(index_file)
    if missing and single in present:
        # An index that was left from an export in shards; loaders then read the single file.
        message = f"names missing shards, and {single.name} is complete"
        return _read(folder, [single], None, [suspicious("index", index_file.name, message)])
    extra = [
        suspicious("index", file.name, "the index does not name it")
        for file in sorted(set(present) - set(indexed))
    ]
    return _read(folder, [file for file in indexed if file.is_file()], index, [*missing, *extra])


def _read(
    folder: Path, files: Sequence[Path], index: Mapping[str, str] | None, findings: list[Finding]
) -> Files:
    headers: dict[Path, Header] = {}
    for file in files:
        try:
            headers[file] = header_of_files(file, [file], folder)
        except UnexpectedTensor as error:
            findings.append(finding_from_error("duplicates", file.name, error, file))
        except CheckpointError as error:
            findings.append(finding_from_error("header", file.name, error, file))
    findings += _duplicates(headers)
    if index is not None:
        findings += _index_against_shards(index, headers)
    record = _record(folder, findings)
    return Files(folder, headers, index, record, tuple(findings))


def _duplicates(headers: Mapping[Path, Header]) -> Iterator[Finding]:
    first: dict[str, Path] = {}
    for file, header in headers.items():
        for key in header.tensors:
            if key in first:
                message = f"is stored twice: in {first[key].name} and in {file.name}"
                yield broken("duplicates", key, message)
            first.setdefault(key, file)


def _index_against_shards(
    index: Mapping[str, str], headers: Mapping[Path, Header]
) -> Iterator[Finding]:
    stored = {file.name: header.tensors for file, header in headers.items()}
    for key, name in index.items():
        if name in stored and key not in stored[name]:
            yield broken("index", key, f"the index assigns it to {name}, which does not contain it")
    for name, tensors in stored.items():
        for key in tensors:
            if key not in index:
                yield suspicious("index", key, f"is in {name}, and the index does not name it")


def recorded_checksums(files: Files) -> dict[Path, str]:
    """Return {file: SHA-256 in hex} from mezzotint.json and from file names in the Hub's cache.

    huggingface_hub's cache links each file to a blob, whose name is the SHA-256 of a large file.
    """
    recorded = {}
    for file in files.headers:
        blob = file.resolve().name
        is_sha256 = len(blob) == SHA256_LENGTH and set(blob) <= set("0123456789abcdef")
        if file.is_symlink() and is_sha256:
            recorded[file] = blob
    shards = files.record.shards
    return recorded | {
        file: shards[file.name].sha256 for file in files.headers if file.name in shards
    }


def missing_recorded_files(files: Files) -> Iterator[Finding]:
    """Yield findings for missing shards that mezzotint.json records."""
    reported = {finding.where for finding in files.findings}
    for name in files.record.shards:
        if name not in reported and not (files.folder / name).is_file():
            yield broken(
                "checksums",
                name,
                f"{SIDECAR} records it, and it is missing",
                DOWNLOAD_AGAIN,
                files.folder / name,
            )


def check_checksum(file: Path, sha256: str) -> Iterator[Finding]:
    """Yield a finding if a file's checksum differs from the recorded one."""
    actual = hash_file(file).sha256
    if actual != sha256:
        message = f"has SHA-256 {actual[:12]}..., and {sha256[:12]}... was recorded"
        hint = f"its bytes have changed; {DOWNLOAD_AGAIN}"
        yield broken("checksums", file.name, message, hint, file)


def _record(folder: Path, findings: list[Finding]) -> Record:
    """Read mezzotint.json. Add a finding and return an empty record if that fails."""
    file = folder / SIDECAR
    if not file.is_file():
        return Record()
    try:
        return validated(Record, read_object(file), file)
    except CheckpointError as error:
        message = error.message.removeprefix(f"{file}: ")
        findings.append(
            suspicious(
                "checksums", SIDECAR, f"cannot be read ({message}): checksums were not compared"
            )
        )
        return Record()
