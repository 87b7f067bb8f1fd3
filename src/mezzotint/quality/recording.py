"""Recording of a bounded sample of the inputs of a model's linear layers, for each step."""

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mezzotint.errors import BadRequest
from mezzotint.families import Sampling
from mezzotint.generation.generate import generate
from mezzotint.quality.candidate import ModelSpec
from mezzotint.quality.prompts import Prompt, generate_arguments

SAMPLE_ROWS = 64
"""Number of rows (tokens) of a layer's input that are recorded per step."""


@dataclass(frozen=True)
class InputSample:
    """A layer's input in one step. Tensors are on the CPU.

    rows   [at most SAMPLE_ROWS, in], evenly spaced tokens of the step's first call
    amax   float32 [in], largest magnitude of each channel over all tokens and calls
    """

    step: int
    rows: Tensor
    amax: Tensor


@dataclass
class InputRecording:
    """The recorded samples, as {component: {module: samples in the order of steps}}.

    A layer has no sample of a step that does not call it.
    """

    samples: dict[str, dict[str, list[InputSample]]] = field(default_factory=dict)

    def samples_of(self, component: str, module: str) -> Sequence[InputSample]:
        """Return the samples of one layer."""
        return self.samples.get(component, {}).get(module, ())


def record_inputs(
    candidate: ModelSpec,
    modules: Mapping[str, Collection[str]],
    prompts: Sequence[Prompt],
    seed: int,
    sampling: Sampling,
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> InputRecording:
    """Load a model, generate each prompt once and record the inputs of its layers.

    The model is freed afterwards.

    modules   {component: names of its linear layers}
    on_step   called after each step
    Raises    BadRequest if the model does not have one of the layers
    """
    recording, step = InputRecording(), 0

    def count(number: int, _latents: Tensor) -> None:
        nonlocal step
        step = number + 1
        on_step()

    pipe = candidate.load(device).pipe
    models = {component: getattr(pipe, component) for component in modules}
    with _recording_hooks(models, modules, recording, lambda: step):
        generate(
            pipe,
            **generate_arguments(prompts, seed),
            sampling=sampling,
            on_step=count,
            check_output=False,
        )
    del pipe, models
    gc.collect()  # A pipeline is part of reference cycles; the candidate needs its memory.
    return recording


@contextmanager
def _recording_hooks(
    models: Mapping[str, nn.Module],
    modules: Mapping[str, Collection[str]],
    recording: InputRecording,
    step: Callable[[], int],
) -> Iterator[None]:
    """Record the inputs of the named layers while the context is open."""
    handles = []
    for component, names in modules.items():
        layers = dict(models[component].named_modules())
        for name in names:
            if name not in layers:
                raise BadRequest(
                    f"the reference has no layer {name}", "name a reference of the same model."
                )
            samples = recording.samples.setdefault(component, {}).setdefault(name, [])
            handles.append(layers[name].register_forward_pre_hook(_input_hook(samples, step)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(
    samples: list[InputSample], step: Callable[[], int]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].detach().flatten(0, -2)
        amax = tokens.abs().amax(0).float().cpu()
        # Classifier-free guidance calls a layer twice per step; both calls count for amax.
        if samples and samples[-1].step == step():
            first = samples.pop()
            samples.append(InputSample(first.step, first.rows, torch.maximum(first.amax, amax)))
        else:
            count = min(SAMPLE_ROWS, len(tokens))
            spaced = torch.linspace(0, len(tokens) - 1, count, device=tokens.device).long()
            samples.append(InputSample(step(), tokens[spaced].cpu(), amax))

    return record
