"""A reference and a candidate opened side by side, as `diagnose` looks at them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mezzotint.builtin import resolve
from mezzotint.errors import BadRequest
from mezzotint.families import Sampling
from mezzotint.kernels import device_of
from mezzotint.loading import LoadPlan
from mezzotint.pipelines import plan_transformers, settings_for
from mezzotint.quality.candidate import Candidate, read_sources
from mezzotint.quality.layers import Side
from mezzotint.quality.prompts import Prompt, prompts_for


@dataclass(frozen=True)
class Pair:
    """Two models, the transformers of both, and what is painted to look at them."""

    reference: Candidate
    candidate: Candidate
    sides: tuple[Side, ...]
    prompts: tuple[Prompt, ...]
    seed: int
    sampling: Sampling
    device: torch.device

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "prompts": [prompt.text for prompt in self.prompts],
            "images": [prompt.image.to_dict() if prompt.image else None for prompt in self.prompts],
            "seed": self.seed,
            "steps": self.sampling.steps,
            "size": [self.sampling.width or self.sampling.size, self.sampling.size],
            "frames": self.sampling.num_frames,
            "layers": self.sides[0].pattern,
            "device": str(self.device),
        }


def open_pair(
    reference: str,
    candidate: str,
    model: str | None,
    prompts: str | None,
    image: str | Path | None,
    seed: int,
    steps: int,
    layers: str,
    device: str | torch.device | None,
    size: Mapping[str, int] | None = None,
    frames: int | None = None,
) -> Pair:
    """Open both, no weight read; the arguments are those of `diagnose`. Raises MezzotintError if they do not fit."""
    first, second = read_sources(reference, [candidate], model)
    chosen = prompts_for([first.model, second.model], prompts, image)[: None if prompts else 1]
    return Pair(
        first,
        second,
        tuple(sides_of(first, second, layers)),
        chosen,
        seed,
        settings_for(first.model, chosen[0].picture, steps=steps, num_frames=frames, **(size or {})),
        device_of(device),
    )


Opened = Mapping[str, tuple[LoadPlan, nn.Module]]
"""{component: how one model's transformer would be loaded, and into what}"""


def opened(source: Candidate) -> Opened:
    """The transformers of a model, no weight read."""
    return plan_transformers(resolve(source.model), source.transformer, source.transformer_2, source.activations)


def sides_of(reference: Candidate, candidate: Candidate, layers: str) -> list[Side]:
    """Every transformer of both models. Raises BadRequest if they do not have the same ones, or none such a layer."""
    first, second = opened(reference), opened(candidate)
    if not same_tensors(first, second):
        raise BadRequest(
            "the reference and the candidate are not the same model: their tensors differ in name or shape",
            "name the unquantized model that the candidate was made of.",
        )
    sides = paired(first, second, layers)
    if not any(side.names for side in sides):
        raise BadRequest(
            f"--layers is {layers!r}, and no layer is called so", "`mezzotint inspect --layers` lists them."
        )
    return sides


def paired(reference: Opened, candidate: Opened, layers: str) -> list[Side]:
    """The transformers of two models of the same tensors, side by side."""
    return [Side(name, reference[name][0].checkpoint, candidate[name][0].checkpoint, layers) for name in reference]


def same_tensors(first: Opened, second: Opened) -> bool:
    """Whether two models are to be filled with tensors of the same names and shapes."""
    return _shapes(first) == _shapes(second)


def _shapes(plans: Opened) -> dict[str, tuple[int, ...]]:
    """{component and tensor: shape} of the models that are to be filled."""
    return {
        f"{component}.{name}": tuple(value.shape)
        for component, (_, model) in plans.items()
        for name, value in model.state_dict().items()
    }


class Progress:
    """Counts what is done, and says so."""

    def __init__(self, total: int, on_progress: Callable[[int, int, str], None]) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def __call__(self, what: str) -> None:
        self.done += 1
        self.say(what)

    def say(self, what: str) -> None:
        self.on_progress(self.done, self.total, what)
