"""Recorded transformer calls of one model, which another model can compute again."""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.costs import synchronized_time
from mezzotint.generation.generate import generate
from mezzotint.quality.pair import ModelPair
from mezzotint.quality.prompts import generate_arguments
from mezzotint.tensor import relative_error


@dataclass(frozen=True)
class Call:
    """One call of a transformer in a denoising step, with its output. Tensors are on the CPU."""

    component: str
    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prediction: Tensor


@dataclass(frozen=True)
class Calls:
    """All transformer calls of one or more generations.

    sigma_steps   absolute differences of the scheduler's sigmas, one per step
    """

    calls: tuple[Call, ...]
    sigma_steps: tuple[float, ...]

    def for_component(self, component: str) -> list[Call]:
        """Return the calls of one transformer."""
        return [call for call in self.calls if call.component == component]

    def in_step(self, step: int) -> list[Call]:
        """Return the calls of one step."""
        return [call for call in self.calls if call.step == step]


@dataclass(frozen=True)
class PredictionError:
    """The mean relative error of a transformer's predictions, and the median time of a call."""

    error: float
    milliseconds: float


def record_calls(pair: ModelPair, on_step: Callable[[], None]) -> Calls:
    """Generate with the reference, record its transformer calls, and free the model."""
    pipe = pair.reference.load(pair.device).pipe
    calls: list[Call] = []
    finished_steps = 0

    def hook(component: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def record(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            cpu, step = torch.device("cpu"), finished_steps % pair.sampling.steps
            inputs = _to_device(args, cpu), _to_device(kwargs, cpu)
            calls.append(Call(component, step, *inputs, _flatten_output(output).cpu()))

        return record

    def count(step: int, _latents: Tensor) -> None:
        nonlocal finished_steps
        finished_steps = step + 1
        on_step()

    names = [transformers.component for transformers in pair.transformers]
    handles = [
        getattr(pipe, name).register_forward_hook(hook(name), with_kwargs=True) for name in names
    ]
    generate(
        pipe,
        **generate_arguments(pair.prompts, pair.seed),
        sampling=pair.sampling,
        on_step=count,
        check_output=False,
    )
    for handle in handles:
        handle.remove()
    sigma_steps = tuple(pipe.scheduler.sigmas.diff().abs().tolist())
    del pipe
    gc.collect()  # A pipeline is part of reference cycles; the candidate needs its memory.
    return Calls(tuple(calls), sigma_steps)


@torch.no_grad()
def evaluate_calls(
    transformer: nn.Module, calls: Sequence[Call], device: torch.device
) -> PredictionError:
    """Compute recorded calls with a transformer. Without calls, error and time are 0."""
    if not calls:
        return PredictionError(0.0, 0.0)
    errors, times = [], []
    for call in calls:
        args, kwargs = _to_device(call.args, device), _to_device(call.kwargs, device)
        started = synchronized_time(device)
        prediction = transformer(*args, **kwargs)
        times.append(synchronized_time(device) - started)
        errors.append(relative_error(_flatten_output(prediction).cpu(), call.prediction))
    return PredictionError(statistics.fmean(errors), statistics.median(times) * 1000)


def _to_device(value: Any, device: torch.device) -> Any:
    """Return a copy of nested arguments with all tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_device(item, device) for item in value)
    return value


def _flatten_output(output: Any) -> Tensor:
    """Return all values of a transformer's output as float32 [n]."""
    if isinstance(output, Tensor):
        return output.detach().float().flatten()
    items = output.values() if isinstance(output, dict) else output
    return torch.cat([_flatten_output(item) for item in items])
