"""The effect of BF16 activations in each denoising step, and a schedule based on it."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from mezzotint.generation.schedule import StepSchedule
from mezzotint.nn import unquantized_activations
from mezzotint.quality.sensitivity.recorded_calls import (
    Call,
    Calls,
    PredictionError,
    evaluate_calls,
)

MIN_SHARE = 0.5
"""Share of the error reduction of BF16 activations in all steps that a schedule must achieve."""


@dataclass(frozen=True)
class StepGain:
    """The effect of BF16 activations in one step.

    error             RMS error of the latents after the step, in units of the noise, with quantized
                      activations
    error_reduction   decrease of the error with BF16 activations
    milliseconds      additional time of a transformer call
    """

    step: int
    error: float
    error_reduction: float
    milliseconds: float

    @property
    def error_reduction_per_ms(self) -> float:
        """Return the error reduction per additional millisecond."""
        return per_ms(self.error_reduction, self.milliseconds)

    def to_dict(self) -> dict[str, Any]:
        """Return the gain as JSON."""
        return asdict(self) | {"error_reduction_per_ms": self.error_reduction_per_ms}


def per_ms(error_reduction: float, milliseconds: float) -> float:
    """Return the error reduction per additional millisecond; infinite if it takes no time."""
    if milliseconds > 0:
        return error_reduction / milliseconds
    return math.copysign(math.inf, error_reduction)


def step_gains(
    transformers: dict[str, nn.Module],
    calls: Calls,
    device: torch.device,
    on_step: Callable[[int], None],
) -> tuple[StepGain, ...]:
    """Measure the effect of BF16 activations in each step, from the reference's latents."""
    gains = []
    for step, sigma_step in enumerate(calls.sigma_steps):
        step_calls = calls.in_step(step)
        quantized = _evaluate(transformers, step_calls, device)
        with ExitStack() as stack:
            for model in transformers.values():
                stack.enter_context(unquantized_activations(model))
            unquantized = _evaluate(transformers, step_calls, device)
        # An Euler step of flow matching moves the latents by sigma_step * prediction.
        distances = [sigma_step * _rms(call) for call in step_calls]
        error, bf16_error = (
            fmean(
                prediction.error * distance
                for prediction, distance in zip(predictions, distances, strict=True)
            )
            for predictions in (quantized, unquantized)
        )
        milliseconds = fmean(
            b.milliseconds - a.milliseconds for a, b in zip(quantized, unquantized, strict=True)
        )
        gains.append(StepGain(step, error, error - bf16_error, milliseconds))
        on_step(step)
    return tuple(gains)


def schedule_for(gains: Sequence[StepGain]) -> StepSchedule | None:
    """Return the shortest schedule that achieves MIN_SHARE of the possible error reduction.

    Among schedules of the same length, return the best one. Return None if BF16 activations do not
    reduce the error.
    """
    reductions = [gain.error_reduction for gain in gains]
    if sum(reductions) <= 0:
        return None
    for count in range(1, len(reductions) + 1):
        splits = [(first, count - first) for first in range(count + 1)]
        reduction, first, last = max(
            (sum(reductions[:first]) + sum(reductions[len(reductions) - last :]), first, last)
            for first, last in splits
        )
        if reduction >= MIN_SHARE * sum(reductions):
            return StepSchedule(first, last)
    return None


def _evaluate(
    transformers: dict[str, nn.Module], calls: Sequence[Call], device: torch.device
) -> list[PredictionError]:
    return [evaluate_calls(transformers[call.component], [call], device) for call in calls]


def _rms(call: Call) -> float:
    return float(call.prediction.square().mean().sqrt())
