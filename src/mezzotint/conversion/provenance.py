"""The metadata files of an output: config.json, the index, and mezzotint.json.

mezzotint.json contains the provenance and the checksums of the shards.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mezzotint._version import VERSION
from mezzotint.checkpoint import Checkpoint
from mezzotint.containers import read_container
from mezzotint.containers.container import read_range
from mezzotint.containers.shard_index import INDEX_SUFFIX
from mezzotint.hub import local_copy
from mezzotint.saving import Shard, ShardRecord, weight_index

SIDECAR = "mezzotint.json"
VERSION_KEY = "mezzotint_version"
"""Entry of mezzotint.json, or of a single file's metadata, that marks an output of Mezzotint."""
PIPELINE = "pipeline"
"""Entry of mezzotint.json with the path and the copied files of the merged pipeline."""
STEM = "diffusion_pytorch_model"
SHA256_LENGTH = 64


def source_info(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the names, sizes and hashes of a source's files."""
    return {
        "path": str(checkpoint.header.path),
        "format": checkpoint.detected.format.name,
        "notes": list(checkpoint.header.notes),
        "files": [_file_info(local_copy(file)) for file in checkpoint.header.files],
    }


def _file_info(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    # Every container puts its header, or most of it, in front of the first tensor.
    end = min((tensor.start for tensor in read_container(file).tensors.values()), default=size)
    header = hashlib.sha256(read_range(file, 0, end)).hexdigest()
    info = {"name": file.name, "size": size, "header_sha256": header}
    # Hashing a whole file takes long. The Hub's cache names large files by their SHA-256.
    blob = file.resolve().name
    is_sha256 = len(blob) == SHA256_LENGTH and all(digit in "0123456789abcdef" for digit in blob)
    return info | ({"sha256": blob} if is_sha256 else {})


def plan_digest(shards: Sequence[Shard], info: Mapping[str, Any]) -> str:
    """Return a short digest of everything that determines the output's bytes."""
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for shard in shards:
        digest.update(shard.name.encode() + shard.header())
    return digest.hexdigest()[:12]


def model_config(source: Checkpoint, base: Checkpoint | None) -> dict[str, Any]:
    """Return the source's model configuration, or the base's, without its quantization."""
    candidates = [source.header.config, base.header.config if base is not None else {}]
    return unquantized_config(
        next((entries for entries in candidates if "_class_name" in entries), {})
    )


def unquantized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component's configuration without its quantization."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def write_metadata_files(
    folder: Path,
    prefix: str,
    shards: Sequence[Shard],
    records: Mapping[str, ShardRecord],
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Write all files of a component folder except its shards."""
    checksums = {name.removeprefix(prefix): asdict(record) for name, record in records.items()}
    component = folder / prefix
    _write_json(component / "config.json", config)
    ordered = dict(sorted(checksums.items()))
    _write_json(
        component / SIDECAR, {VERSION_KEY: VERSION} | dict(provenance) | {"shards": ordered}
    )
    if len(shards) > 1:
        stem = shards[0].name.removeprefix(prefix).rpartition("-of-")[0].rpartition("-")[0]
        _write_json(component / f"{stem}{INDEX_SUFFIX}", weight_index(shards, prefix))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
