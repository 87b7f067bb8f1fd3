"""A transformer's calls while a model paints, kept, and answered again by another."""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.costs import now
from mezzotint.painting import paint
from mezzotint.quality.pair import Pair
from mezzotint.quality.prompts import request
from mezzotint.quality.signatures import relative_error


@dataclass(frozen=True)
class Call:
    """One call of a transformer in denoising step `step`; tensors are on the CPU."""

    component: str
    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prediction: Tensor


@dataclass(frozen=True)
class Calls:
    """All calls of one or more paintings.

    strides   how far each step moves the latents along the prediction: the differences of the scheduler's sigmas
    """

    calls: tuple[Call, ...]
    strides: tuple[float, ...]

    def of(self, component: str) -> list[Call]:
        return [call for call in self.calls if call.component == component]

    def in_step(self, step: int) -> list[Call]:
        return [call for call in self.calls if call.step == step]


@dataclass(frozen=True)
class Answer:
    """How a transformer answers calls: relative error of the prediction (mean), and milliseconds a call (median)."""

    error: float
    milliseconds: float


def record_calls(pair: Pair, on_step: Callable[[], None]) -> Calls:
    """Let the reference paint, and keep its transformers' calls; the model is freed afterwards."""
    pipe = pair.reference.load(pair.device)
    calls: list[Call] = []
    done = 0

    def keep(component: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            cpu, step = torch.device("cpu"), done % pair.sampling.steps
            calls.append(Call(component, step, _moved(args, cpu), _moved(kwargs, cpu), _joined(output).cpu()))

        return look

    def count(step: int, _latents: Tensor) -> None:
        nonlocal done
        done = step + 1
        on_step()

    components = [side.component for side in pair.sides]
    handles = [getattr(pipe, name).register_forward_hook(keep(name), with_kwargs=True) for name in components]
    paint(pipe, **request(pair.prompts, pair.seed), sampling=pair.sampling, on_step=count, guard=False)
    for handle in handles:
        handle.remove()
    strides = tuple(pipe.scheduler.sigmas.diff().abs().tolist())
    del pipe
    gc.collect()  # as in runs.py: the candidate is to find the memory free
    return Calls(tuple(calls), strides)


@torch.no_grad()
def answer(transformer: nn.Module, calls: Sequence[Call], device: torch.device) -> Answer:
    """Answer the calls; of none the error is 0 and the time 0."""
    errors, times = [0.0] * (not calls), [0.0] * (not calls)
    for call in calls:
        args, kwargs = _moved(call.args, device), _moved(call.kwargs, device)
        began = now(device)
        prediction = transformer(*args, **kwargs)
        times.append(now(device) - began)
        errors.append(relative_error(_joined(prediction).cpu(), call.prediction))
    return Answer(statistics.fmean(errors), statistics.median(times) * 1000)


def _moved(value: Any, device: torch.device) -> Any:
    """Arguments with their tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if isinstance(value, list | tuple) else value


def _joined(output: Any) -> Tensor:
    """All numbers that a transformer gives, float32 [n]."""
    if isinstance(output, Tensor):
        return output.detach().float().flatten()
    return torch.cat([_joined(item) for item in (output.values() if isinstance(output, dict) else output)])
