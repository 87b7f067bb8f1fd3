"""What is written beside the shards: config.json, the index, and mezzotint.json with provenance and checksums."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mezzotint._version import VERSION
from mezzotint.checkpoint import Checkpoint
from mezzotint.hub import local_copy
from mezzotint.saving import Shard, ShardRecord, weight_index

SIDECAR = "mezzotint.json"
VERSION_KEY = "mezzotint_version"
"""By this entry, in mezzotint.json or in a single file's metadata, an output is known for one of ours."""
PIPELINE = "pipeline"
"""The entry of mezzotint.json that says which pipeline stands around the component."""
STEM = "diffusion_pytorch_model"
SHA256_LENGTH = 64


def source_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which files a conversion has read: names, sizes, the SHA-256 of their headers, and of the whole where known."""
    return {
        "path": str(checkpoint.header.path),
        "format": checkpoint.recognised.format.name,
        "notes": list(checkpoint.header.notes),
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


def plan_name(shards: Sequence[Shard], facts: Mapping[str, Any]) -> str:
    """A short name for everything that decides the output's bytes."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for shard in shards:
        digest.update(shard.name.encode() + shard.header())
    return digest.hexdigest()[:12]


def model_config(source: Checkpoint, base: Checkpoint | None) -> dict[str, Any]:
    """The model's configuration without its quantization: the source's, or else the base's."""
    candidates = [source.header.config, base.header.config if base is not None else {}]
    return unquantized_config(next((entries for entries in candidates if "_class_name" in entries), {}))


def unquantized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A component's configuration without its quantization."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


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
    _write_json(component / SIDECAR, {VERSION_KEY: VERSION} | dict(provenance) | {"shards": ordered})
    if len(shards) > 1:
        stem = shards[0].name.removeprefix(prefix).rpartition("-of-")[0].rpartition("-")[0]
        _write_json(component / f"{stem}.safetensors.index.json", weight_index(shards, prefix))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
