"""One generation request: prompts, seeds, settings, and every default of a generation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

from PIL.Image import Image

from mezzotint.errors import BadRequest
from mezzotint.families import Sampling
from mezzotint.generation.step_schedule import FP8_ATTENTION_STEPS, NO_STEPS, StepSchedule


class RequestSettings(TypedDict, total=False):
    """The fields of `Request` besides `prompts`, as keyword arguments."""

    seeds: Sequence[int] | None
    sampling: Sampling | None
    source_images: Sequence[Image | None] | None
    bf16_steps: StepSchedule
    bf16_attention_steps: StepSchedule
    check_output: bool


@dataclass(frozen=True)
class Request:
    """What to generate: one image or video for each prompt.

    prompts                one or more; each produces its own image or video
    seeds                  one per prompt, for the initial noise; None for 0, 1, 2, ...
    sampling               None for the settings that are recommended for the model
    source_images          one RGB image to edit per prompt, or None where a prompt has none
    bf16_steps             steps that keep the activations of quantized layers, and FP8 attention,
                           in BF16
    bf16_attention_steps   steps that keep only FP8 attention in BF16; ignored without FP8 attention
    check_output           raise BadOutput for NaN, one color or noise; False reports it in
                           `problems`

    Raises BadRequest if the number of seeds or source images is not the number of prompts.
    """

    prompts: Sequence[str]
    seeds: Sequence[int] | None = None
    sampling: Sampling | None = None
    source_images: Sequence[Image | None] | None = None
    bf16_steps: StepSchedule = NO_STEPS
    bf16_attention_steps: StepSchedule = FP8_ATTENTION_STEPS
    check_output: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise BadRequest("prompts is one string", "pass a list of prompts.")
        for values, name in ((self.seeds, "seed"), (self.source_images, "image")):
            if values is not None and len(values) != len(self.prompts):
                raise BadRequest(
                    f"{len(self.prompts)} prompts and {len(values)} {name}s",
                    f"give one {name} for each prompt.",
                )

    @classmethod
    def of(
        cls, prompts: "Request | Sequence[str]", **settings: Unpack[RequestSettings]
    ) -> "Request":
        """Return the request, or make one from prompts and settings. Raises BadRequest."""
        if isinstance(prompts, Request):
            return replace(prompts, **settings)
        return cls(prompts, **settings)

    def __iter__(self) -> Iterator[tuple[str, int, Image | None]]:
        """Yield the prompt, the seed and the source image of each image or video."""
        count = len(self.prompts)
        seeds = range(count) if self.seeds is None else self.seeds
        images = [None] * count if self.source_images is None else self.source_images
        return iter(zip(self.prompts, seeds, images, strict=True))
