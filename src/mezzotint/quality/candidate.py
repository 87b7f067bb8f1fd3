"""One model of a comparison: its source, its execution options and its name in the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from mezzotint.builtin import DEMO, is_pipeline, resolve
from mezzotint.errors import BadRequest
from mezzotint.generation.pipeline import LoadedPipeline, load_pipeline
from mezzotint.generation.source import PipelineSource
from mezzotint.generation.step_schedule import NO_STEPS, StepSchedule
from mezzotint.hub import AnyPath
from mezzotint.kernels import QUANTIZED_ACTIVATIONS, check_backend_choice
from mezzotint.loading.residency import AS_STORED_BITS
from mezzotint.quality.source_spec import split_source


@dataclass(frozen=True)
class ModelSpec:
    """A model to load, its options and its name in the report.

    The fields have the meaning that they have in `mezzotint.load`.

    resident     defaults to the stored bits, because the resident weights are part of the verdict
    bf16_steps   step schedule for generation, as in `mezzotint.generate`
    paths        {source: its resolved path}, so that a name is resolved only once
    """

    name: str
    model: str
    transformer: str | None = None
    transformer_2: str | None = None
    activations: str = QUANTIZED_ACTIVATIONS
    backend: str | None = None
    resident: str = AS_STORED_BITS
    bf16_steps: str = str(NO_STEPS)
    paths: Mapping[str, AnyPath] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def source(self) -> PipelineSource:
        """Open the pipeline and its transformers, once. Raises MezzotintError."""
        names = {"transformer": self.transformer, "transformer_2": self.transformer_2}
        transformers = {
            component: self._path(name) for component, name in names.items() if name is not None
        }
        return PipelineSource.open(self._path(self.model), transformers)

    def load(self, device: torch.device) -> LoadedPipeline:
        """Load the pipeline. Raises MezzotintError."""
        return load_pipeline(
            self.source,
            device,
            activations=self.activations,
            backend=self.backend,
            resident=self.resident,
        )

    @property
    def schedule(self) -> StepSchedule:
        """Return the parsed step schedule."""
        return StepSchedule.parse(self.bf16_steps)

    def check(self) -> None:
        """Raise every error that `load` can raise before it reads a weight."""
        _ = self.schedule
        check_backend_choice(self.backend)
        self.source.plan(self.activations)

    def to_dict(self) -> dict[str, str | None]:
        return {name: getattr(self, name) for name in REPORTED_FIELDS}

    def _path(self, name: str) -> str | AnyPath:
        """Return the resolved path of a source, or the name of anything else."""
        return self.paths.get(name, name)


REPORTED_FIELDS = (
    "name",
    "model",
    "transformer",
    "transformer_2",
    "activations",
    "backend",
    "resident",
    "bf16_steps",
)
"""Fields of a ModelSpec that a report contains."""


def parse_sources(
    reference: str, candidates: list[str], model: str | None = None
) -> tuple[ModelSpec, ...]:
    """Parse the reference and the candidates from `[NAME=]SOURCE[,OPTION=VALUE...]`.

    SOURCE   a pipeline or a transformer: a value that `load` accepts as `model` or `transformer`
    OPTION   transformer_2, activations, backend or resident, as in `load`; bf16_steps, a schedule
    model    pipeline for sources that are only a transformer; None selects the reference if it is
             a pipeline, and the built-in model otherwise
    Raises   BadRequest for an unknown option or a duplicate name
    """
    sources = [split_source(text) for text in (reference, *candidates)]
    paths = {source: resolve(source) for source in dict.fromkeys(text for _, text, _ in sources)}
    pipeline = model or (sources[0][1] if is_pipeline(paths[sources[0][1]]) else DEMO)
    specs = tuple(replace(_model_spec(*source, pipeline, paths), paths=paths) for source in sources)
    names = [spec.name for spec in specs]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise BadRequest(
            f"two models have the name {duplicate!r}", "name them: first=PATH second=PATH."
        )
    return specs


def _model_spec(
    name: str, source: str, options: dict[str, str], model: str, paths: Mapping[str, AnyPath]
) -> ModelSpec:
    if is_pipeline(paths[source]):
        return ModelSpec(name, source, **options)  # type: ignore[arg-type]
    return ModelSpec(name, model, source, **options)  # type: ignore[arg-type]
