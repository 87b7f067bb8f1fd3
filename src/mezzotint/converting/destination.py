"""What stands at the output in the end: a file, a component folder, or a whole pipeline with the component in place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.builtin import COMPONENT
from mezzotint.converting.earlier_output import strangers
from mezzotint.converting.merging import MergedPipeline
from mezzotint.converting.provenance import STEM, write_small_files
from mezzotint.errors import BadRequest
from mezzotint.formats.writing import Target
from mezzotint.hub import AnyPath
from mezzotint.saving import Shard, ShardRecord, check_place, recover, true_place
from mezzotint.saving.places import check_replaceable


@dataclass(frozen=True)
class Destination:
    """Where the shards go, and what is put beside them.

    path     the output
    folder   the component's path inside it, "" or "transformer/"
    file     the output is one safetensors file
    merged   the pipeline whose other files are copied into the output, if any
    """

    path: Path
    folder: str
    file: bool
    merged: MergedPipeline | None

    @classmethod
    def of(cls, path: Path, target: Target, component: str | None, merge_into: str | AnyPath | None) -> "Destination":
        """Raises BadRequest where path, target and pipeline do not fit together."""
        path = true_place(path)
        if merge_into is None:
            suffix = _suffix(path, target)
            return cls(path.with_name(f"{path.name}{suffix}") if suffix else path, "", target.file, None)
        if target.file:
            raise BadRequest(f"{target.title} is a single file, and --merge-into makes a folder")
        merged = MergedPipeline.of(merge_into, component or COMPONENT)
        return cls(path, f"{merged.component}/", False, merged)

    @property
    def stem(self) -> str:
        return self.path.name.removesuffix(".safetensors") if self.file else STEM

    def check(self, read: list[AnyPath], overwrite: bool) -> None:
        """Raise BadRequest, before anything is read, if the output may not stand there.

        read   what the output is made from, besides the pipeline
        """
        sources = [*read, *([self.merged.folder] if self.merged else [])]
        check_place(self.path, [source for source in sources if isinstance(source, Path)])
        recover(self.path, strangers)
        check_replaceable(self.path, overwrite, self.file, strangers)

    def finish(
        self,
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        shards: list[Shard],
        folder: Path,
        records: Mapping[str, ShardRecord],
    ) -> None:
        """Write the small files."""
        if not self.file:
            write_small_files(folder, self.folder, shards, records, config, provenance)


def _suffix(path: Path, target: Target) -> str:
    return ".safetensors" if target.file and path.name and path.suffix != ".safetensors" else ""
