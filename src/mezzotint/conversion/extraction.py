"""Extraction of one component of an all-in-one file: its tensors as they are, under short names."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mezzotint._version import VERSION
from mezzotint.builtin import resolve
from mezzotint.checkpoint.file_component import ComponentReport, open_component
from mezzotint.containers import TensorInfo
from mezzotint.conversion.earlier_output import unknown_files
from mezzotint.conversion.progress import Progress, counter
from mezzotint.conversion.provenance import VERSION_KEY, plan_digest
from mezzotint.conversion.reading import files_read
from mezzotint.conversion.tensor_bytes import copy_tensor
from mezzotint.errors import Unsupported
from mezzotint.formats import Header
from mezzotint.formats.components import COMFY_METADATA
from mezzotint.formats.renaming import Renames
from mezzotint.saving import (
    Entry,
    Group,
    Output,
    Shard,
    ShardRecord,
    WatchedFiles,
    check_place,
    resolve_parent,
    split_into_shards,
    write_output,
)
from mezzotint.saving.places import check_replaceable

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class ExtractReport:
    """The result of an extraction; `component` describes what was extracted."""

    output: Path
    component: ComponentReport
    nbytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        component = self.component.to_dict()
        return asdict(self) | {"output": str(self.output), "component": component}


def extract_component(
    source: str | Path,
    output: str | Path,
    component: str,
    *,
    rename: Renames | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> ExtractReport:
    """Write one component of an all-in-one file into a safetensors file of its own.

    Values, dtypes and scales stay as they are. Names lose the component's prefix: a text encoder
    has transformers' names then, and a VAE the makers', as ComfyUI's own files of components.

    component   "text_encoder" or "vae" if the file has one, or the component's name in the file
    rename      {regular expression: replacement} for tensor names of the source
    overwrite   replace an earlier output when the new one is complete
    Raises      MezzotintError; `output` is then unchanged
    """
    started = time.monotonic()
    path = resolve_parent(Path(output))
    path = path if path.suffix == SUFFIX else path.with_name(f"{path.name}{SUFFIX}")
    with WatchedFiles() as watched:
        read = files_read(resolve(source), None)
        watched.watch(read)
        found, header = open_component(source, component, rename)
        report = ComponentReport.of(found, header)
        check_place(path, read)
        check_replaceable(path, overwrite, True, unknown_files)
        shard = _shard(header, path.stem)
        plan = plan_digest([shard], {"sources": watched.stamps, "component": report.component})
        planned = Output(path, plan, [shard], _finish, True, {}, unknown_files, watched.check)
        write_output(planned, overwrite, counter(planned.total, on_progress))
    return ExtractReport(path, report, planned.nbytes, time.monotonic() - started)


def _finish(_folder: Path, _records: Mapping[str, ShardRecord]) -> None:
    """Write no further file."""


def _shard(header: Header, stem: str) -> Shard:
    groups = [_group(name, info) for name, info in header.tensors.items()]
    metadata = {"format": "pt", VERSION_KEY: VERSION}
    metadata |= {key: header.metadata[key] for key in (COMFY_METADATA,) if key in header.metadata}
    (shard,) = split_into_shards(groups, None, "", stem, metadata)
    return shard


def _group(name: str, info: TensorInfo) -> Group:
    if not isinstance(info.dtype, torch.dtype):
        raise Unsupported(
            f"{info.file}: {info.name} is in blocks of {info.dtype}, which safetensors cannot hold",
            "components are extracted from safetensors and torch.save files.",
        )
    return Group((Entry(name, info.dtype, info.shape),), partial(copy_tensor, info))
