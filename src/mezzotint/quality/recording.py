"""What the linear layers of a model are given while it paints: a bounded sample of their inputs, step by step."""

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mezzotint.errors import BadRequest
from mezzotint.families import Sampling
from mezzotint.painting import paint
from mezzotint.quality.candidate import Candidate
from mezzotint.quality.prompts import Prompt, request

ROWS = 64
"""How many rows (tokens) of a layer's input are kept of each step."""


@dataclass(frozen=True)
class Sample:
    """A layer's input in one step of one picture.

    rows   [at most ROWS, in], evenly spaced over the tokens of the step's first call, in the dtype they came in; CPU
    amax   float32 [in], the largest magnitude of each channel over all tokens and calls
    """

    step: int
    rows: Tensor
    amax: Tensor


@dataclass
class Recording:
    """{component: {module: its samples, in the order of steps}}; a layer that a step does not call has none of it."""

    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)

    def of(self, component: str, module: str) -> Sequence[Sample]:
        return self.samples.get(component, {}).get(module, ())


def record(
    candidate: Candidate,
    modules: Mapping[str, Collection[str]],
    prompts: Sequence[Prompt],
    seed: int,
    sampling: Sampling,
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> Recording:
    """Load a model, paint each prompt once, and keep what its layers were given; the model is freed afterwards.

    modules   {component: names of its linear layers}
    on_step   called after each step
    Raises    BadRequest if the model has no such layer
    """
    recording, step = Recording(), 0

    def count(number: int, _latents: Tensor) -> None:
        nonlocal step
        step = number + 1
        on_step()

    pipe = candidate.load(device)
    models = {component: getattr(pipe, component) for component in modules}
    with _watched(models, modules, recording, lambda: step):
        paint(pipe, **request(prompts, seed), sampling=sampling, on_step=count, guard=False)
    del pipe, models
    gc.collect()  # as in runs.py: what comes next is to find the memory free
    return recording


@contextmanager
def _watched(
    models: Mapping[str, nn.Module],
    modules: Mapping[str, Collection[str]],
    recording: Recording,
    step: Callable[[], int],
) -> Iterator[None]:
    """Note the inputs of the named layers while the context is open."""
    handles = []
    for component, names in modules.items():
        layers = dict(models[component].named_modules())
        for name in names:
            if name not in layers:
                raise BadRequest(f"the reference has no layer {name}", "name a reference of the same model.")
            kept = recording.samples.setdefault(component, {}).setdefault(name, [])
            handles.append(layers[name].register_forward_pre_hook(_keeper(kept, step)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keeper(kept: list[Sample], step: Callable[[], int]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def keep(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].detach().flatten(0, -2)
        amax = tokens.abs().amax(0).float().cpu()
        if kept and kept[-1].step == step():
            first = kept.pop()
            kept.append(Sample(first.step, first.rows, torch.maximum(first.amax, amax)))
        else:
            spaced = torch.linspace(0, len(tokens) - 1, min(ROWS, len(tokens)), device=tokens.device).long()
            kept.append(Sample(step(), tokens[spaced].cpu(), amax))

    return keep
