"""The pictures and videos that a pipeline paints, each from the noise of its own seed."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from mezzotint.editing import check_pipeline, pipeline_for
from mezzotint.errors import BadRequest, UnsoundPicture, Unsupported
from mezzotint.failures import failures_named
from mezzotint.families import Sampling, family_with
from mezzotint.guard import problems_of
from mezzotint.latent_grid import LatentGrid
from mezzotint.pipelines import sampling_of
from mezzotint.prompt_length import cut_prompts
from mezzotint.schedule import NO_STEPS, StepSchedule, scheduled
from mezzotint.turns import alone

OF_PIPELINES = (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What diffusers' pipelines raise where components do not fit together, or settings cannot be."""


@dataclass(frozen=True)
class Painting:
    """What was painted, and the latents that the last step left: [prompts, ...] in the dtype of the pipeline.

    images   one a prompt, or none if videos were painted
    videos   one a prompt, each a list of its frames, `fps` a second
    problems what the output guard saw, by prompt; empty for what can be a picture
    notes    what was done otherwise than asked: prompts that were cut
    """

    images: list[Image]
    latents: Tensor
    videos: list[list[Image]] = field(default_factory=list)
    fps: int | None = None
    problems: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


def paint(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    on_step: Callable[[int, Tensor], None] = lambda _step, _latents: None,
    guard: bool = True,
    images: Sequence[Image | None] | None = None,
    bf16_steps: StepSchedule = NO_STEPS,
    bf16_attention_steps: StepSchedule = NO_STEPS,
) -> Painting:
    """Paint one picture or video for each prompt; number i starts from the noise of seeds[i], drawn on the CPU.

    seeds      None for 0, 1, 2, ...
    sampling   None for the model's recommended settings
    on_step    called after each step with its number, counted over all pictures, and the latents
    guard      False to be given what the output guard objects to; it is in the painting's `problems` then
    bf16_steps which of the steps leave the inputs of quantized layers, and FP8 attention's, in BF16;
               `bf16_attention_steps` those that do it for FP8 attention alone
    images     the pictures that are edited, RGB, for pipelines that take one; None for pictures from the prompt alone
    Raises     BadRequest if there is not one seed and image for each prompt, the pipeline takes no image, sides or
               frames are not those of whole latents, or `on_step` calls it with the same pipeline;
               UnsoundPicture for NaN, one colour, or noise

    Threads take turns, one picture each, where their pipelines share a scheduler. Calls of the pipeline itself
    (`pipe(...)`) take no turns: a scheduler keeps the state of one picture at a time.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    images = [None] * len(prompts) if images is None else images
    for given, name in ((seeds, "seed"), (images, "image")):
        if len(given) != len(prompts):
            raise BadRequest(f"{len(prompts)} prompts and {len(given)} {name}s", f"give one {name} for each prompt.")
    painters = [_painter(pipe, image is not None) for image in images]
    sampling = sampling or sampling_of(pipe.config._name_or_path)
    LatentGrid.of(pipe.vae.config, pipe.transformer.config).check(sampling)
    notes = cut_prompts(pipe, prompts, sampling)
    painted: list[Any] = []
    latents: list[Tensor] = []
    for number, (painter, prompt, seed, image) in enumerate(zip(painters, prompts, seeds, images, strict=True)):
        with alone(pipe), scheduled(bf16_steps, bf16_attention_steps, sampling.steps) as between:
            count = partial(_count_on, on_step, between, number * sampling.steps)
            one, last = _paint_one(painter, prompt, seed, image, sampling, count)
        painted.append(one)
        latents.append(last)
    video = isinstance(painted[0], list)
    frames = painted if video else [[picture] for picture in painted]
    problems = tuple(map(problems_of, frames, latents))
    if guard and any(problems):
        raise UnsoundPicture(*unsound(prompts, problems))
    if video:
        return Painting([], torch.cat(latents), painted, sampling.fps, problems, notes)
    return Painting(painted, torch.cat(latents), problems=problems, notes=notes)


def unsound(prompts: Sequence[str], problems: Sequence[Sequence[str]]) -> tuple[str, str]:
    """What the output guard saw, and what to do, as an error says it."""
    seen = [f"{prompt!r}: {'; '.join(found)}" for prompt, found in zip(prompts, problems, strict=True) if found]
    return (
        f"{len(seen)} of {len(prompts)} cannot be pictures: {'. '.join(seen)}",
        "`mezzotint verify` looks for damage in the checkpoint; --backend reference rules a kernel out.",
    )


def _count_on(
    on_step: Callable[[int, Tensor], None],
    between: Callable[[int], AbstractContextManager[None]],
    before: int,
    step: int,
    latents: Tensor,
) -> None:
    with between(step):
        on_step(before + step, latents)


def _paint_one(
    pipe: Any,
    prompt: str,
    seed: int,
    image: Image | None,
    sampling: Sampling,
    on_step: Callable[[int, Tensor], None],
) -> tuple[Any, Tensor]:
    """One picture or video and its last latents. Alone in its batch, so that it does not depend on its neighbours."""
    last: list[Tensor] = []

    def keep(_pipe: Any, step: int, _timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        last[:] = [values["latents"]]
        on_step(step, values["latents"])
        return {}

    arguments = _arguments(pipe, image, sampling)
    with np.errstate(invalid="ignore"), _failures_of(pipe):  # the guard reports NaN better than numpy's warning
        output = pipe(
            prompt=[prompt],
            generator=[torch.Generator("cpu").manual_seed(seed)],
            callback_on_step_end=keep,
            **arguments,
        )
        return (output.frames if hasattr(output, "frames") else output.images)[0], last[0]


def _failures_of(pipe: Any) -> failures_named:
    """Names what a pipeline raises of itself; what a caller's `on_step` raises, if of another kind, passes through."""
    where = f"{type(pipe).__name__} of {pipe.config.get('_name_or_path') or 'this process'}"
    hint = "its text encoder, transformer and VAE may be of different models; `load` names what it read."
    return failures_named(where, "generating failed", hint, Unsupported, OF_PIPELINES)


def _painter(pipe: Any, given: bool) -> Any:
    """The pipeline itself, or one of its components for what it does with a picture."""
    wanted = pipeline_for(type(pipe), pipe.config, given)
    check_pipeline(wanted, given)
    if wanted is type(pipe):
        return pipe
    painter = wanted(**pipe.components, expand_timesteps=pipe.config.expand_timesteps)
    painter.set_progress_bar_config(disable=True)
    return painter


def _arguments(pipe: Any, image: Image | None, sampling: Sampling) -> dict[str, Any]:
    """The settings, and the picture that is edited, as one pipeline takes them."""
    family = family_with(type(pipe.transformer).__name__, type(pipe).__name__)
    given = family.arguments(sampling, 1) | ({} if image is None else {"image": image})
    if "max_area" in inspect.signature(pipe.__call__).parameters:  # Kontext scales the sides to it, else to 1024 x 1024
        given["max_area"] = given["height"] * given["width"]
    return given
