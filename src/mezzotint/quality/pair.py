"""A reference and a candidate whose transformers are opened in pairs, for `diagnose`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from mezzotint.errors import BadRequest
from mezzotint.families import Sampling
from mezzotint.generation.transformer_planning import PlannedTransformers
from mezzotint.kernels import resolve_device
from mezzotint.quality.candidate import ModelSpec, parse_sources
from mezzotint.quality.layers import TransformerPair
from mezzotint.quality.prompts import Prompt, prompts_for

STEPS = 2
"""Denoising steps by default."""


class PairSettings(TypedDict, total=False):
    """The keyword arguments that `diagnose` and `sensitivity` share.

    model     pipeline for sources that are only a transformer; None for the reference
    prompts   a set or a file; None selects the first prompt of the set for the model
    image     file of the source image for prompts that name no image
    seed      of the noise of every image
    steps     denoising steps per image
    size      {"width": pixels, "height": pixels}; None selects the model's default
    frames    of each video; None selects the model's default
    layers    glob that selects layers, such as "*.ff.*"
    device    None selects the best one
    """

    model: str | None
    prompts: str | None
    image: str | Path | None
    seed: int
    steps: int
    size: Mapping[str, int] | None
    frames: int | None
    layers: str
    device: str | torch.device | None


@dataclass(frozen=True)
class ModelPair:
    """Two models, their transformers in pairs, and the prompts and settings to generate with."""

    reference: ModelSpec
    candidate: ModelSpec
    transformers: tuple[TransformerPair, ...]
    prompts: tuple[Prompt, ...]
    seed: int
    sampling: Sampling
    device: torch.device

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings as the report shows them."""
        return {
            "prompts": [prompt.text for prompt in self.prompts],
            "images": [prompt.image.to_dict() if prompt.image else None for prompt in self.prompts],
            "seed": self.seed,
            "steps": self.sampling.steps,
            "size": [self.sampling.width or self.sampling.height, self.sampling.height],
            "frames": self.sampling.num_frames,
            "layers": self.transformers[0].pattern,
            "device": str(self.device),
        }


def open_pair(
    reference: str,
    candidate: str,
    *,
    model: str | None = None,
    prompts: str | None = None,
    image: str | Path | None = None,
    seed: int = 0,
    steps: int = STEPS,
    size: Mapping[str, int] | None = None,
    frames: int | None = None,
    layers: str = "*",
    device: str | torch.device | None = None,
) -> ModelPair:
    """Open both models without reading a weight. `PairSettings` documents the arguments.

    Raises   MezzotintError if the models do not fit together, or an argument does not fit them
    """
    first, second = parse_sources(reference, [candidate], model)
    chosen = prompts_for([first.source, second.source], prompts, image)[: None if prompts else 1]
    return ModelPair(
        first,
        second,
        tuple(transformer_pairs(first, second, layers)),
        chosen,
        seed,
        first.source.sampling(
            chosen[0].source_image, steps=steps, num_frames=frames, **(size or {})
        ),
        resolve_device(device),
    )


def plan_model(model: ModelSpec) -> PlannedTransformers:
    """Return the load plans of a model's transformers without reading a weight."""
    return model.source.plan(model.activations)


def transformer_pairs(
    reference: ModelSpec, candidate: ModelSpec, layers: str
) -> list[TransformerPair]:
    """Return every transformer of both models in pairs.

    Raises BadRequest if the tensors of the models differ, or no layer matches `layers`.
    """
    first, second = plan_model(reference), plan_model(candidate)
    if not same_tensors(first, second):
        raise BadRequest(
            "the reference and the candidate are not the same model: "
            "their tensors differ in name or shape",
            "name the unquantized model that the candidate was made from.",
        )
    pairs = pair_transformers(first, second, layers)
    if not any(pair.names for pair in pairs):
        raise BadRequest(
            f"--layers is {layers!r}, and no layer matches it",
            "`mezzotint inspect --layers` lists the layers.",
        )
    return pairs


def pair_transformers(
    reference: PlannedTransformers, candidate: PlannedTransformers, layers: str
) -> list[TransformerPair]:
    """Pair the transformers of two models that have the same tensors."""
    return [
        TransformerPair(name, reference[name][0].checkpoint, candidate[name][0].checkpoint, layers)
        for name in reference
    ]


def same_tensors(first: PlannedTransformers, second: PlannedTransformers) -> bool:
    """Return whether two models need tensors of the same names and shapes."""
    return _shapes(first) == _shapes(second)


def _shapes(plans: PlannedTransformers) -> dict[str, tuple[int, ...]]:
    """Return {component and tensor name: shape} of the tensors that the models need."""
    return {
        f"{component}.{name}": tuple(value.shape)
        for component, (_, model) in plans.items()
        for name, value in model.state_dict().items()
    }


class Progress:
    """A counter of finished work items that reports each one to a callback."""

    def __init__(self, total: int, on_progress: Callable[[int, int, str], None]) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def __call__(self, message: str) -> None:
        """Count one finished item and report it."""
        self.done += 1
        self.report(message)

    def report(self, message: str) -> None:
        """Report the current state without counting an item."""
        self.on_progress(self.done, self.total, message)
