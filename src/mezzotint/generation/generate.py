"""Generate images and videos, one at a time, each from its own seed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from mezzotint.errors import BadOutput, BadRequest, Unsupported
from mezzotint.families import Sampling, family_by_transformer
from mezzotint.fast.passes.attention import uses_fp8_attention
from mezzotint.generation.cancel import CancelToken
from mezzotint.generation.flow_shift import with_flow_shift
from mezzotint.generation.output_check import describe_problems, find_problems
from mezzotint.generation.pipeline import recommended_sampling, transformers_of
from mezzotint.generation.pipeline_selection import check_source_image, select_pipeline_class
from mezzotint.generation.prompt_length import cut_prompts
from mezzotint.generation.request import Request, RequestSettings
from mezzotint.generation.result import GenerationResult
from mezzotint.generation.sampling_options import call_arguments
from mezzotint.generation.schedule import NO_STEPS, StepSchedule, apply_schedule
from mezzotint.generation.turns import alone
from mezzotint.untrusted.library_failures import convert_errors

__all__ = ["GenerationResult", "effective_attention_steps", "generate", "generate_stream"]

PIPELINE_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What diffusers' pipelines raise for components that do not fit together, or invalid settings."""
OnStep = Callable[[int, Tensor], None]


def generate(
    pipe: DiffusionPipeline,
    prompts: Request | Sequence[str],
    *,
    on_step: OnStep = lambda _step, _latents: None,
    cancel: CancelToken | None = None,
    **settings: Unpack[RequestSettings],
) -> GenerationResult:
    """Generate one image or video for each prompt.

    pipe       a diffusers pipeline of a known family, such as `load` returns
    prompts    one or more prompts, or a Request
    settings   the other fields of Request, which has their defaults: seeds, sampling,
               source_images, ...
    Raises     what `generate_stream` raises; BadOutput as soon as one image fails the output check

    >>> generate(pipe, ["a large red circle on a blue background"], seeds=[7]).images[0]
    """
    request = Request.of(prompts, **settings)
    results = generate_stream(pipe, request, on_step=on_step, cancel=cancel)
    return GenerationResult.merge(list(results))


def generate_stream(
    pipe: DiffusionPipeline,
    request: Request,
    *,
    on_step: OnStep = lambda _step, _latents: None,
    cancel: CancelToken | None = None,
) -> Iterator[GenerationResult]:
    """Return an iterator that generates and checks one image or video at a time.

    Each result has one image or video. Its noise is drawn on the CPU from its own seed. It is alone
    in its batch, so it does not depend on the others. Threads whose pipelines share a scheduler
    take turns, one image each. Direct calls of the pipeline (`pipe(...)`) take no turns.

    on_step   called after each step with its number in the whole request, and the latents
    cancel    checked before each image and after each step
    Raises    BadRequest, before anything is generated, for unsupported settings or source images;
              BadOutput for NaN, one color or noise; Cancelled; Unsupported for pipeline errors
    """
    if not request.prompts:
        raise BadRequest("there is no prompt", "give at least one.")
    sampling = request.sampling or recommended_sampling(pipe.config._name_or_path)
    family = family_by_transformer(type(pipe.transformer).__name__, type(pipe).__name__)
    family.latent_grid(pipe.vae.config, pipe.transformer.config).check(sampling)
    calls = [_prepare_call(pipe, prompt, seed, image, sampling) for prompt, seed, image in request]
    return _run_calls(pipe, calls, request, on_step, cancel or CancelToken())


@dataclass(frozen=True)
class _PipelineCall:
    """One call of a pipeline: one image or video."""

    pipe: DiffusionPipeline
    prompt: str
    seed: int
    arguments: dict[str, Any]
    sampling: Sampling

    def run(self, on_step: OnStep) -> tuple[Any, Tensor]:
        """Return the image, or the frames of a video, and the last latents.

        Raises  Unsupported for errors of the pipeline; those of `on_step` pass through
        """
        trajectory: list[Tensor] = []

        def step_done(
            _pipe: DiffusionPipeline, step: int, _timestep: Any, values: dict[str, Tensor]
        ) -> dict[str, Tensor]:
            trajectory[:] = [values["latents"]]
            on_step(step, values["latents"])
            return {}

        # numpy warns about NaN when it converts to 8 bits; the output check reports it better.
        with np.errstate(invalid="ignore"), _named_failures(self.pipe):
            output = self.pipe(
                prompt=[self.prompt],
                generator=[torch.Generator("cpu").manual_seed(self.seed)],
                callback_on_step_end=step_done,
                **self.arguments,
            )
            return (output.frames if hasattr(output, "frames") else output.images)[0], trajectory[0]

    def check(self, generated: Any, latents: Tensor) -> GenerationResult:
        """Return the result of `run` with its problems and notes."""
        is_video = isinstance(generated, list)
        return GenerationResult(
            images=[] if is_video else [generated],
            latents=latents,
            videos=[generated] if is_video else [],
            fps=self.sampling.fps if is_video else None,
            problems=(find_problems(generated if is_video else [generated], latents),),
            notes=cut_prompts(self.pipe, [self.prompt], self.sampling),
        )


def _run_calls(
    pipe: DiffusionPipeline,
    calls: Sequence[_PipelineCall],
    request: Request,
    on_step: OnStep,
    cancel: CancelToken,
) -> Iterator[GenerationResult]:
    """Run the calls in order. Raises BadOutput, Cancelled, Unsupported."""
    schedules = request.bf16_steps, effective_attention_steps(pipe, request)
    for number, call in enumerate(calls):
        cancel.check()
        offset = number * call.sampling.steps
        result = call.check(
            *_run_call(pipe, call, schedules, partial(_count, on_step, offset), cancel)
        )
        if request.check_output and any(result.problems):
            raise BadOutput(*describe_problems([call.prompt], result.problems))
        yield result


def _run_call(
    pipe: DiffusionPipeline,
    call: _PipelineCall,
    schedules: tuple[StepSchedule, StepSchedule],
    on_step: OnStep,
    cancel: CancelToken,
) -> tuple[Any, Tensor]:
    """Run one call while no other thread uses the scheduler of `pipe`."""
    with (
        alone(pipe),
        apply_schedule(
            transformers_of(pipe).values(), *schedules, call.sampling.steps
        ) as between_steps,
    ):

        def step_done(step: int, latents: Tensor) -> None:
            with between_steps(step):
                on_step(step, latents)
                cancel.check()

        return call.run(step_done)


def _count(on_step: OnStep, offset: int, step: int, latents: Tensor) -> None:
    on_step(offset + step, latents)


def effective_attention_steps(pipe: DiffusionPipeline, request: Request) -> StepSchedule:
    """Return the steps that run FP8 attention in BF16; none where no attention is in FP8."""
    is_fp8 = any(map(uses_fp8_attention, transformers_of(pipe).values()))
    return request.bf16_attention_steps if is_fp8 else NO_STEPS


def _prepare_call(
    pipe: DiffusionPipeline, prompt: str, seed: int, image: Image | None, sampling: Sampling
) -> _PipelineCall:
    """Choose the pipeline and its arguments. Raises BadRequest, Unsupported."""
    pipe = with_flow_shift(_pipeline_for(pipe, image is not None), sampling.flow_shift)
    family = family_by_transformer(type(pipe.transformer).__name__, type(pipe).__name__)
    arguments = call_arguments(type(pipe), pipe.config, family, sampling)
    if image is not None:
        arguments["image"] = image
    return _PipelineCall(pipe, prompt, seed, arguments, sampling)


def _pipeline_for(pipe: DiffusionPipeline, has_source_image: bool) -> DiffusionPipeline:
    """Return the pipeline, or one of its components for a source image (Wan 2.2 TI2V-5B)."""
    wanted = select_pipeline_class(type(pipe), pipe.config, has_source_image)
    check_source_image(wanted, has_source_image)
    if wanted is type(pipe):
        return pipe
    with_image = wanted(**pipe.components, expand_timesteps=pipe.config.expand_timesteps)
    with_image.set_progress_bar_config(disable=True)
    return with_image


def _named_failures(pipe: DiffusionPipeline) -> convert_errors:
    where = f"{type(pipe).__name__} of {pipe.config.get('_name_or_path') or 'this process'}"
    hint = "its text encoder, transformer and VAE may be of different models."
    return convert_errors(where, "generating failed", hint, Unsupported, PIPELINE_ERRORS)
