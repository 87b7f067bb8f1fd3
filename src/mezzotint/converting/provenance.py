"""What is written beside the shards: config.json, the index, and mezzotint.json with provenance and checksums."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mezzotint._version import VERSION
from mezzotint.checkpoint import Checkpoint
from mezzotint.hub import local_copy
from mezzotint.saving import Shard, ShardRecord, weight_index

SIDECAR = "mezzotint.json"
SHA256_LENGTH = 64


def source_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which files a conversion has read: names, sizes, the SHA-256 of their headers, and of the whole where known."""
    return {
        "path": str(checkpoint.header.path),
        "format": checkpoint.recognised.format.name,
        "files": [_file_facts(local_copy(file)) for file in checkpoint.header.files],
    }


def _file_facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header = hashlib.sha256(prefix + stream.read(int.from_bytes(prefix, "little"))).hexdigest()
    facts = {"name": file.name, "size": file.stat().st_size, "header_sha256": header}
    blob = file.resolve().name
    known = len(blob) == SHA256_LENGTH and all(digit in "0123456789abcdef" for digit in blob)
    return facts | ({"sha256": blob} if known else {})


def stamps(checkpoints: Iterable[Checkpoint | None]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of every file that is read: a change of any of them is another conversion."""
    given = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
    files = [local_copy(file).resolve() for checkpoint in given for file in checkpoint.header.files]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def plan_name(shards: Sequence[Shard], facts: Mapping[str, Any]) -> str:
    """A short name for everything that decides the output's bytes."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for shard in shards:
        digest.update(shard.name.encode() + shard.header())
    return digest.hexdigest()[:12]


def model_config(source: Checkpoint, base: Checkpoint | None) -> dict[str, Any]:
    """The model's configuration without its quantization, from beside the source, from inside it, or from the base."""
    candidates = [source.header.config, _inner_config(source), base.header.config if base is not None else {}]
    config = next((entries for entries in candidates if "_class_name" in entries), {})
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _inner_config(source: Checkpoint) -> Mapping[str, Any]:
    """The configuration that single files carry in their metadata."""
    try:
        entries = json.loads(source.header.metadata.get("config", "{}"))
    except (ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def write_small_files(
    folder: Path,
    prefix: str,
    shards: Sequence[Shard],
    records: Mapping[str, ShardRecord],
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Write everything of a component folder but its shards."""
    checksums = {name.removeprefix(prefix): asdict(record) for name, record in records.items()}
    component = folder / prefix
    _write_json(component / "config.json", config)
    ordered = dict(sorted(checksums.items()))
    _write_json(component / SIDECAR, {"mezzotint_version": VERSION} | dict(provenance) | {"shards": ordered})
    if len(shards) > 1:
        stem = shards[0].name.removeprefix(prefix).rpartition("-of-")[0].rpartition("-")[0]
        _write_json(component / f"{stem}.safetensors.index.json", weight_index(shards, prefix))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
