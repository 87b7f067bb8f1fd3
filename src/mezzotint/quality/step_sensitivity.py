"""What BF16 activations buy in each denoising step, and the schedule that it comes to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import nn

from mezzotint.nn import unrounded_inputs
from mezzotint.quality.calls import Answer, Call, Calls, answer
from mezzotint.schedule import StepSchedule

ENOUGH = 0.5
"""Share of what BF16 activations in all steps would buy that a schedule has to buy."""


@dataclass(frozen=True)
class StepGain:
    """One step, the inputs of its layers left in BF16.

    error          how far the step moves the latents wrongly, all inputs rounded: RMS in units of the noise
    fall           by how much that is less with BF16 inputs
    milliseconds   how much longer a call of the transformer takes then
    """

    step: int
    error: float
    fall: float
    milliseconds: float

    @property
    def fall_per_ms(self) -> float:
        return per_millisecond(self.fall, self.milliseconds)


def per_millisecond(fall: float, milliseconds: float) -> float:
    """What a fall of an error costs; infinite where it costs nothing."""
    return fall / milliseconds if milliseconds > 0 else math.copysign(math.inf, fall)


def step_gains(
    transformers: dict[str, nn.Module], calls: Calls, device: torch.device, on_step: Callable[[int], None]
) -> tuple[StepGain, ...]:
    """What BF16 activations buy in each step, in the order of the steps; each from the reference's latents."""
    gains = []
    for step, stride in enumerate(calls.strides):
        own = calls.in_step(step)
        rounded = _answers(transformers, own, device)
        with unrounded_inputs():
            unrounded = _answers(transformers, own, device)
        moved = [stride * _rms(call) for call in own]
        before, after = (
            fmean(one.error * far for one, far in zip(answers, moved, strict=True)) for answers in (rounded, unrounded)
        )
        longer = fmean(b.milliseconds - a.milliseconds for a, b in zip(rounded, unrounded, strict=True))
        gains.append(StepGain(step, before, before - after, longer))
        on_step(step)
    return tuple(gains)


def schedule_for(gains: Sequence[StepGain]) -> StepSchedule | None:
    """The shortest schedule that buys `ENOUGH`, the best among equally short ones; None if nothing is to be bought."""
    falls = [gain.fall for gain in gains]
    if sum(falls) <= 0:
        return None
    for count in range(1, len(falls) + 1):
        splits = [(first, count - first) for first in range(count + 1)]
        bought, first, last = max(
            (sum(falls[:first]) + sum(falls[len(falls) - last :]), first, last) for first, last in splits
        )
        if bought >= ENOUGH * sum(falls):
            return StepSchedule(first, last)
    return None


def _answers(transformers: dict[str, nn.Module], calls: Sequence[Call], device: torch.device) -> list[Answer]:
    return [answer(transformers[call.component], [call], device) for call in calls]


def _rms(call: Call) -> float:
    return float(call.prediction.square().mean().sqrt())
