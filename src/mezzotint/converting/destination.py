"""What stands at the output in the end: a file, a component folder, or a whole pipeline with the component in place."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.builtin import COMPONENT, PIPELINE_INDEX, is_pipeline
from mezzotint.converting.provenance import write_small_files
from mezzotint.errors import BadRequest
from mezzotint.formats.writing import Target
from mezzotint.saving import Shard, ShardRecord

STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Destination:
    """Where the shards go, and what is put beside them.

    path     the output
    folder   the component's path inside it, "" or "transformer/"
    file     the output is one safetensors file
    merged   the pipeline whose other files are linked into the output, if any
    """

    path: Path
    folder: str
    file: bool
    merged: Path | None

    @classmethod
    def of(cls, path: Path, target: Target, component: str | None, merge_into: Path | None) -> "Destination":
        """Raises BadRequest where path, target and pipeline do not fit together."""
        path = path.absolute()
        if merge_into is None:
            return cls(path.with_name(f"{path.name}{_suffix(path, target)}"), "", target.file, None)
        name = component or COMPONENT
        if target.file:
            raise BadRequest(f"{target.title} is a single file, and --merge-into makes a folder")
        if not is_pipeline(merge_into):
            raise BadRequest(f"{merge_into}: no diffusers pipeline is there ({PIPELINE_INDEX} is missing)")
        if path == merge_into.resolve():
            raise BadRequest(f"{path}: is the base pipeline itself", "name another output.")
        return cls(path, f"{name}/", False, merge_into)

    @property
    def stem(self) -> str:
        return self.path.name.removesuffix(".safetensors") if self.file else STEM

    def finish(
        self,
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        shards: list[Shard],
        folder: Path,
        records: Mapping[str, ShardRecord],
    ) -> None:
        """Write the small files, and link the rest of the pipeline."""
        if not self.file:
            write_small_files(folder, self.folder, shards, records, config, provenance)
        if self.merged is not None:
            _link_others(self.merged, folder, self.folder)


def _suffix(path: Path, target: Target) -> str:
    return ".safetensors" if target.file and path.suffix != ".safetensors" else ""


def _link_others(pipeline: Path, folder: Path, component: str) -> None:
    """Hard links to every file of the pipeline outside the component; copies where the disk is another one."""
    for file in sorted(pipeline.rglob("*")):
        relative = file.relative_to(pipeline)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not file.is_file() or f"{relative.as_posix()}".startswith(component):
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), target)
        except OSError:
            shutil.copyfile(file, target)
