"""The base pipeline of --merge-into: checked like `load` checks it, then copied file by file."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from mezzotint.builtin import PIPELINE_INDEX, is_pipeline, resolve
from mezzotint.checkpoint import Checkpoint
from mezzotint.conversion.provenance import unquantized_config
from mezzotint.errors import BadRequest, UnknownFormat
from mezzotint.families.building import build_meta_model
from mezzotint.generation.download import is_downloaded
from mezzotint.generation.fit import check_fit
from mezzotint.generation.pipeline_index import TRANSFORMERS, PipelineIndex, read_index
from mezzotint.generation.transformer_planning import open_transformer, plan_transformer
from mezzotint.hub import AnyPath, HubPath, local_copy
from mezzotint.loading import plan

WEIGHTS = (
    ".safetensors",
    ".sft",
    ".gguf",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".onnx",
    ".msgpack",
    ".h5",
)
"""Suffixes of weights next to model_index.json. These are single-file copies of the model, which no
pipeline reads."""


@dataclass(frozen=True)
class MergedPipeline:
    """A local or Hub pipeline, of which the output replaces one component."""

    folder: AnyPath
    component: str

    @classmethod
    def of(cls, name: str | AnyPath, component: str) -> "MergedPipeline":
        """Return the pipeline. Raises BadRequest or NotACheckpoint if there is none."""
        folder = resolve(name)
        if not is_pipeline(folder):
            raise BadRequest(
                f"{folder}: is not a diffusers pipeline ({PIPELINE_INDEX} is missing)",
                "use the folder or the Hub id of a pipeline for --merge-into.",
            )
        return cls(folder, component)

    @cached_property
    def index(self) -> PipelineIndex:
        """Return the content of model_index.json."""
        return read_index(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the pipeline's configuration of the component, without its quantization."""
        return unquantized_config(self.index.config_of(self.component))

    def check(self, checkpoint: Checkpoint) -> None:
        """Plan the merged pipeline like `load` does, with the checkpoint as the component.

        Raises  MezzotintError if the checkpoint has another family or size, or another component
                cannot be loaded
        """
        components = self.index.components
        if self.component not in components:
            raise BadRequest(
                f"{self.folder}: {PIPELINE_INDEX} names no {self.component}",
                f"its components are: {', '.join(components)}. --component selects one of them.",
            )
        self._check_fit(checkpoint, components[self.component].class_name)
        for other in set(TRANSFORMERS) & components.keys() - {self.component}:
            plan_transformer(other, open_transformer(other, None, self.index), self.index)

    def _check_fit(self, checkpoint: Checkpoint, model_class: str) -> None:
        family = checkpoint.family
        if family.transformer_class != model_class:
            raise UnknownFormat(
                f"{checkpoint.header.path}: is a {family.title} transformer "
                f"({family.transformer_class}), and the {self.component} of {self.folder} "
                f"is a {model_class}",
                "use a pipeline of the same family for --merge-into.",
            )
        module = build_meta_model(model_class, self.config)
        plan(checkpoint, module)
        check_fit(family, module, self.index, self.component, f"{checkpoint.header.path}")

    def files(self) -> dict[str, Path]:
        """Return {path in the pipeline: local file} of all files to copy. Download Hub files."""
        names = _on_hub(self.folder) if isinstance(self.folder, HubPath) else _on_disk(self.folder)
        copied = [name for name in names if self._is_copied(name)]
        return {name: local_copy(self.folder / name) for name in sorted(copied)}

    def skipped_files(self) -> list[str]:
        """Return the top-level names in a local pipeline that are not copied."""
        names = () if isinstance(self.folder, HubPath) else _on_disk(self.folder)
        tops = {name.partition("/")[0] for name in names if not self._is_copied(name)}
        return sorted(tops - {self.component})

    def _is_copied(self, name: str) -> bool:
        """Return whether to copy a file.

        All files of the other components are copied, and top-level files except weights.
        """
        top, _, inside = name.partition("/")
        if inside:
            return top != self.component and top in self.index.components
        return not name.endswith(WEIGHTS)


def _on_disk(folder: Path) -> Iterator[str]:
    """Yield the files of a pipeline's folder and its subfolders, except hidden ones.

    The top level is listed separately, because `rglob` does not follow links to folders.
    """
    for top in folder.iterdir():
        for path in [top, *(top.rglob("*") if top.is_dir() else ())]:
            inside = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts):
                yield inside.as_posix()


def _on_hub(folder: HubPath) -> Iterator[str]:
    """Yield the files of a pipeline in a repository, without variants and duplicates of weights."""
    for file in map(PurePosixPath, folder.repo.files):
        if folder.path not in file.parents or file.name.startswith("."):
            continue
        inside = file.relative_to(folder.path)
        if is_downloaded(file.name) or len(inside.parts) == 1:
            yield str(inside)
