"""The pipeline that an output becomes a copy of: checked as `load` would check it, then copied file by file."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from mezzotint.builtin import PIPELINE_INDEX, is_pipeline, resolve
from mezzotint.checkpoint import Checkpoint
from mezzotint.converting.provenance import unquantized_config
from mezzotint.errors import BadRequest, UnknownFormat
from mezzotint.hub import AnyPath, HubPath, local_copy
from mezzotint.kernels import AS_STORED
from mezzotint.loading import plan
from mezzotint.pipeline_index import PipelineIndex, read_index
from mezzotint.pipelines import NEEDED, SECOND, TRANSFORMER, VARIANTS, check_fit, meta_model, plan_transformer

WEIGHTS = (".safetensors", ".sft", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".msgpack", ".h5")
"""Files beside model_index.json that no pipeline is read from: the same model once more, as one file."""


@dataclass(frozen=True)
class MergedPipeline:
    """A diffusers pipeline, here or on the Hub, one component of which the output replaces."""

    folder: AnyPath
    component: str

    @classmethod
    def of(cls, name: str | AnyPath, component: str) -> "MergedPipeline":
        """Raises  BadRequest if no pipeline is there; NotACheckpoint if the Hub does not give it"""
        folder = resolve(name)
        if not is_pipeline(folder):
            raise BadRequest(
                f"{folder}: no diffusers pipeline is there ({PIPELINE_INDEX} is missing)",
                "name the folder or the Hub id of a pipeline as --merge-into.",
            )
        return cls(folder, component)

    @cached_property
    def index(self) -> PipelineIndex:
        return read_index(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration that the pipeline has for the component, which stays, without its quantization."""
        return unquantized_config(self.index.config_of(self.component))

    def check(self, checkpoint: Checkpoint) -> None:
        """Plan the merged pipeline as `load` does, the checkpoint in its place.

        Raises  MezzotintError if the checkpoint is of another family or size, or the rest cannot be loaded
        """
        components = self.index.components
        if self.component not in components:
            raise BadRequest(
                f"{self.folder}: {PIPELINE_INDEX} names no {self.component}",
                f"it has: {', '.join(components)}. --component says which of them is replaced.",
            )
        self._check_fit(checkpoint, components[self.component].class_name)
        for other in {TRANSFORMER, SECOND} & components.keys() - {self.component}:
            plan_transformer(other, None, self.index, AS_STORED, None)

    def _check_fit(self, checkpoint: Checkpoint, model_class: str) -> None:
        family = checkpoint.family
        if family.transformer != model_class:
            raise UnknownFormat(
                f"{checkpoint.header.path}: is a {family.title} transformer ({family.transformer}), and the "
                f"{self.component} of {self.folder} is a {model_class}",
                "name a pipeline of the same family as --merge-into.",
            )
        module = meta_model(model_class, self.config)
        plan(checkpoint, module)
        check_fit(family, module, self.index, self.component, f"{checkpoint.header.path}")

    def files(self) -> dict[str, Path]:
        """{path inside the pipeline: its file, here} of everything but the component; those on the Hub are fetched."""
        names = _on_hub(self.folder) if isinstance(self.folder, HubPath) else _on_disk(self.folder)
        kept = [name for name in names if self._is_kept(name)]
        return {name: local_copy(self.folder / name) for name in sorted(kept)}

    def left_out(self) -> list[str]:
        """What lies in a local pipeline's folder and is not copied, as model_index.json does not speak of it."""
        names = () if isinstance(self.folder, HubPath) else _on_disk(self.folder)
        tops = {name.partition("/")[0] for name in names if not self._is_kept(name)}
        return sorted(tops - {self.component})

    def _is_kept(self, name: str) -> bool:
        """Whether a file of the pipeline's folder is copied: of the other components all, beside them no weights."""
        top, _, inside = name.partition("/")
        if inside:
            return top != self.component and top in self.index.components
        return not name.endswith(WEIGHTS)


def _on_disk(folder: Path) -> Iterator[str]:
    """Files of a pipeline's folder and of the folders in it, which may be links; nothing that is hidden."""
    for top in folder.iterdir():
        for path in [top, *(top.rglob("*") if top.is_dir() else ())]:
            inside = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts):
                yield inside.as_posix()


def _on_hub(folder: HubPath) -> Iterator[str]:
    """The same of a repository, without second copies of weights, and weights that no pipeline is read from."""
    for file in map(PurePosixPath, folder.repo.files):
        if folder.path not in file.parents or file.name.startswith("."):
            continue
        inside = file.relative_to(folder.path)
        needed = file.name.endswith(NEEDED) and not any(mark in file.name for mark in VARIANTS)
        if needed or len(inside.parts) == 1:
            yield str(inside)
