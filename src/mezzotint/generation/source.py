"""Where a pipeline comes from: resolved, read and checked once, for every command."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL.Image import Image

from mezzotint.builtin import DEMO, PIPELINE_INDEX, resolve
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import BadRequest, join_names
from mezzotint.families import Family, Sampling, family_by_transformer
from mezzotint.formats.renaming import Renames
from mezzotint.generation.component_files import check_component
from mezzotint.generation.flow_shift import flow_shift_entry
from mezzotint.generation.pipeline_index import (
    SCHEDULER,
    TRANSFORMER,
    TRANSFORMERS,
    VAE,
    PipelineIndex,
    check_link,
    read_index,
)
from mezzotint.generation.pipeline_selection import check_source_image, select_pipeline_class
from mezzotint.generation.sampling_file import SAMPLING_FILE, read_sampling
from mezzotint.generation.sampling_options import call_arguments
from mezzotint.generation.transformer_planning import (
    PlannedTransformers,
    open_transformer,
    plan_transformer,
)
from mezzotint.hub import AnyPath
from mezzotint.kernels import QUANTIZED_ACTIVATIONS


@dataclass(frozen=True)
class PipelineSource:
    """A diffusers pipeline and its transformers' checkpoints, opened without reading a weight.

    index         the checked model_index.json; its folder is a local one, or one commit of a Hub
                  repository
    checkpoints   {component: opened checkpoint} of the transformers
    replaced      {component: path} of the transformers that are not the pipeline's own

    >>> source = PipelineSource.open("demo", {"transformer": "demo-fp8"})
    >>> source.family.title
    'FLUX.1'
    """

    index: PipelineIndex
    checkpoints: Mapping[str, Checkpoint]
    replaced: Mapping[str, AnyPath] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        model: str | AnyPath = DEMO,
        transformers: Mapping[str, str | AnyPath | None] | None = None,
        *,
        scales_from: str | AnyPath | None = None,
        rename: Renames | None = None,
    ) -> "PipelineSource":
        """Resolve a pipeline once, and open its transformers.

        model          folder or Hub id of a diffusers pipeline, or "demo"
        transformers   {component: file, folder or Hub id} of transformers to use instead of the
                       pipeline's own
        scales_from    a file with the input scales that the transformer lacks, or ModelOpt's
                       backbone.pt for it
        rename         {regular expression: replacement} for tensor names of these transformers
        Raises         MezzotintError if a file is missing, damaged or unknown, or a transformer is
                       of another family
        """
        index = read_index(resolve(model))
        replaced = {
            name: resolve(path) for name, path in (transformers or {}).items() if path is not None
        }
        check_files(index)
        checkpoints = {
            name: open_transformer(
                name,
                replaced.get(name),
                index,
                scales_from if name == TRANSFORMER else None,
                rename if name in replaced else None,
            )
            for name in TRANSFORMERS
            if name in replaced or name in index.components
        }
        return cls(index, checkpoints, replaced)

    @property
    def folder(self) -> AnyPath:
        """Return the pipeline's folder."""
        return self.index.folder

    @property
    def pipeline(self) -> type:
        """Return the diffusers class of the pipeline."""
        return self.index.pipeline

    @property
    def family(self) -> Family:
        """Return the model family. Raises UnknownFormat if the transformer is of none."""
        return family_of_index(self.index)

    def plan(self, activations: str = QUANTIZED_ACTIVATIONS) -> PlannedTransformers:
        """Plan how each transformer is loaded.

        Raises  MezzotintError if a checkpoint is incomplete, or does not fit the pipeline
        """
        return {
            name: plan_transformer(name, checkpoint, self.index, activations)
            for name, checkpoint in self.checkpoints.items()
        }

    def check_source_image(self, has_source_image: bool) -> None:
        """Raise MezzotintError if the pipeline needs a source image, or takes none."""
        check_source_image(self._class_for(has_source_image), has_source_image)
        if self.index.absent:
            raise BadRequest(
                f"{self.folder}: its {PIPELINE_INDEX} leaves out {join_names(self.index.absent)}",
                "add the missing component, or call the pipeline yourself with embeddings.",
            )

    def recommended_sampling(self, source_image: Image | None = None) -> Sampling:
        """Return the recommended settings, in a source image's aspect ratio."""
        return index_sampling(self.index, source_image)

    def sampling(
        self, source_image: Image | None = None, **settings: str | int | float | None
    ) -> Sampling:
        """Return the recommended settings with those that are given and not None.

        Raises  BadRequest for settings that the pipeline does not take, or sizes that its latents
                cannot have
        """
        recommended = self.recommended_sampling(source_image)
        if settings.get("num_frames") is not None and recommended.num_frames is None:
            raise BadRequest("--frames is for videos, and this model generates images")
        sampling = recommended.replace(**settings)
        self._check_sampling(sampling, source_image is not None)
        return sampling

    def _check_sampling(self, sampling: Sampling, has_source_image: bool) -> None:
        configs = (self.index.config_of(component) for component in (VAE, TRANSFORMER))
        self.family.latent_grid(*configs).check(sampling)
        call_arguments(self._class_for(has_source_image), self.index.entries, self.family, sampling)
        if sampling.flow_shift is not None:
            scheduler = self.index.components[SCHEDULER].cls
            flow_shift_entry(scheduler, self.index.config_of(SCHEDULER))

    def _class_for(self, has_source_image: bool) -> type:
        return select_pipeline_class(self.pipeline, self.index.entries, has_source_image)


def check_files(index: PipelineIndex) -> None:
    """Check the local files of all components, except for the transformers' weights."""
    if isinstance(index.folder, Path):
        for name, component in index.components.items():
            check_component(component, weights=name not in TRANSFORMERS)


def family_of_index(index: PipelineIndex) -> Family:
    """Return the family of a pipeline's transformer. Raises UnknownFormat if it is of none."""
    return family_by_transformer(str(index.class_of(TRANSFORMER)), str(index.folder))


def index_sampling(index: PipelineIndex, source_image: Image | None = None) -> Sampling:
    """Return the settings of the family's variant, overridden by the pipeline's own sampling.json.

    source_image   gives the aspect ratio; the area stays as recommended
    Raises         MezzotintError if the index or an entry of sampling.json is invalid
    """
    family = family_of_index(index)
    recommended = family.sampling(index.entries, index.config_of(TRANSFORMER))
    file = index.folder / SAMPLING_FILE
    check_link(file, index.folder)
    if file.is_file():
        recommended = replace(recommended, **read_sampling(file))  # type: ignore[arg-type]
    if source_image is None:
        return recommended
    return recommended.with_aspect_ratio(*source_image.size)
