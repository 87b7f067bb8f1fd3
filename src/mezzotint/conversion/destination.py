"""The destination of a conversion: a file, a component folder, or a pipeline with the component."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.builtin import COMPONENT
from mezzotint.conversion.earlier_output import unknown_files
from mezzotint.conversion.merging import MergedPipeline
from mezzotint.conversion.provenance import STEM, write_metadata_files
from mezzotint.errors import BadRequest
from mezzotint.formats.writers.writer import Target
from mezzotint.hub import AnyPath
from mezzotint.saving import Shard, ShardRecord, check_place, recover, resolve_parent
from mezzotint.saving.places import check_replaceable


@dataclass(frozen=True)
class Destination:
    """The output path and its structure.

    path            the output
    folder          path of the component inside the output: "" or, for example, "transformer/"
    file            whether the output is a single file
    base_pipeline   pipeline whose other files are copied into the output, or None
    """

    path: Path
    folder: str
    file: bool
    base_pipeline: MergedPipeline | None

    @classmethod
    def of(
        cls, path: Path, target: Target, component: str | None, merge_into: str | AnyPath | None
    ) -> "Destination":
        """Return the destination. Raises BadRequest if target and pipeline are incompatible."""
        path = resolve_parent(path)
        if merge_into is None:
            suffix = target.suffix if target.file else ""
            missing = path.name and path.suffix != suffix
            output = path.with_name(f"{path.name}{suffix}") if suffix and missing else path
            return cls(output, "", target.file, None)
        if target.file:
            raise BadRequest(f"{target.title} is a single file, and --merge-into writes a folder")
        base_pipeline = MergedPipeline.of(merge_into, component or COMPONENT)
        return cls(path, f"{base_pipeline.component}/", False, base_pipeline)

    @property
    def stem(self) -> str:
        """Return the stem of the shards' file names."""
        return self.path.name.removesuffix(self.path.suffix) if self.file else STEM

    def check(self, inputs: list[AnyPath], overwrite: bool) -> None:
        """Raise BadRequest, before anything is read, if the output cannot be written there.

        inputs   sources of the output, in addition to the pipeline
        """
        sources = [*inputs, *([self.base_pipeline.folder] if self.base_pipeline else [])]
        check_place(self.path, [source for source in sources if isinstance(source, Path)])
        recover(self.path, unknown_files)
        check_replaceable(self.path, overwrite, self.file, unknown_files)

    def finish(
        self,
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        shards: list[Shard],
        folder: Path,
        records: Mapping[str, ShardRecord],
    ) -> None:
        """Write the metadata files."""
        if not self.file:
            write_metadata_files(folder, self.folder, shards, records, config, provenance)
