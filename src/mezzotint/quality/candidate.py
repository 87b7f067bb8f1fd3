"""One model of a comparison: a source, how it is to run, and its name in the report."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from mezzotint.builtin import DEMO, is_pipeline, resolve
from mezzotint.errors import BadRequest
from mezzotint.kernels import AS_STORED, check_choice
from mezzotint.pipelines import load, plan_transformers
from mezzotint.residency import STORED
from mezzotint.schedule import NO_STEPS, StepSchedule
from mezzotint.sources import split_source


@dataclass(frozen=True)
class Candidate:
    """What to load, and what to call it; the fields are those of `mezzotint.load`, and the schedule that of `paint`.

    resident     as it is stored unless asked, because what is resident is part of the verdict
    bf16_steps   the step schedule that it paints with
    """

    name: str
    model: str
    transformer: str | None = None
    transformer_2: str | None = None
    activations: str = AS_STORED
    backend: str | None = None
    resident: str = STORED
    bf16_steps: str = str(NO_STEPS)

    def load(self, device: torch.device) -> Any:
        """The pipeline."""
        return load(
            self.model,
            self.transformer,
            self.transformer_2,
            device,
            activations=self.activations,
            backend=self.backend,
            resident=self.resident,
        )

    @property
    def schedule(self) -> StepSchedule:
        return StepSchedule.read(self.bf16_steps)

    def check(self) -> None:
        """Raise what `load` would raise before it reads a weight."""
        _ = self.schedule
        check_choice(self.backend)
        plan_transformers(resolve(self.model), self.transformer, self.transformer_2, self.activations)

    def to_dict(self) -> dict[str, str | None]:
        return dict(vars(self))


def read_sources(reference: str, candidates: list[str], model: str | None = None) -> tuple[Candidate, ...]:
    """The reference and the candidates from `[NAME=]SOURCE[,OPTION=VALUE...]`; transformers run inside `model`.

    SOURCE   a pipeline, or a transformer: whatever `load` takes as `model` or as `transformer`
    OPTION   transformer_2, activations, backend or resident, as `load` takes them; bf16_steps, a step schedule
    model    None for the reference, if that is a pipeline, or else the built-in one
    Raises   BadRequest for an option that does not exist, or two of one name
    """
    sources = [split_source(text) for text in (reference, *candidates)]
    around = model or (sources[0][1] if is_pipeline(resolve(sources[0][1])) else DEMO)
    found = tuple(_candidate(*source, around) for source in sources)
    names = [candidate.name for candidate in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadRequest(f"two models are called {twice!r}", "name them: first=PATH second=PATH.")
    return found


def _candidate(name: str, source: str, options: dict[str, str], model: str) -> Candidate:
    if is_pipeline(resolve(source)):
        return replace(Candidate(name, source), **options)
    return replace(Candidate(name, model, source), **options)
