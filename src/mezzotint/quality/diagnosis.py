"""Why a candidate is wrong: every layer is measured, and the suspects among them are named with a cause."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mezzotint.quality.candidate import Candidate
from mezzotint.quality.finite import finite_values
from mezzotint.quality.input_scales import input_fault
from mezzotint.quality.layers import Z_RATIO, Layer, Side, measure, with_z
from mezzotint.quality.pair import Progress, open_pair
from mezzotint.quality.recording import record
from mezzotint.quality.resident import claim_of
from mezzotint.quality.signatures import explain
from mezzotint.quality.weights import usual_error
from mezzotint.schemes import BF16

SCHEMA = "mezzotint.diagnose/1"
STEPS = 2
KERNEL_LIMIT, KERNEL_RATIO = 0.02, 1.5
"""A backend is wrong if it is this far from `reference`, and this many times farther from BF16 than `reference` is."""
PRODUCT_LIMIT = 0.25
"""A product's error that is odd where the weight, the input scale and the kernel are not; below it, a layer that stands
out may owe it to what its input is like."""
Z_LIMIT = 6.0
UNKNOWN = "unknown"
HIGHEST = 1e6
"""The score of a weight that is not a number, and of a file that is not what it says."""


@dataclass(frozen=True)
class Suspect:
    """A layer that is wrong, and why; the score is how many times a measure exceeds what is usual."""

    module: str
    score: float
    cause: str
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found, the most suspect first; `to_dict` is what `mezzotint diagnose --json` prints."""

    reference: Candidate
    candidate: Candidate
    settings: dict[str, Any]
    suspects: tuple[Suspect, ...]
    layers: tuple[Layer, ...]

    def to_dict(self) -> dict[str, Any]:
        values = {
            "schema": SCHEMA,
            "reference": self.reference.to_dict(),
            "candidate": self.candidate.to_dict(),
            "settings": self.settings,
            "suspects": [asdict(suspect) for suspect in self.suspects],
            "layers": [asdict(layer) for layer in self.layers],
        }
        return finite_values(values)


def diagnose(
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
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
) -> Diagnosis:
    """Record what the reference's layers are given, and hold each of the candidate's layers against the reference's.

    The reference is loaded to paint, and freed; the candidate's layers are then read one at a time.

    reference, candidate   `[NAME=]SOURCE[,OPTION=VALUE...]`, see `candidate.read_sources`
    prompts       a set or a file, of which all are painted; None for the first of the set that fits the model
    image         file of the picture that is edited by all prompts that name none of their own
    steps         of each picture
    size, frames  of each picture or video, as `compare` takes them; None for the model's own
    layers        which layers to look at, a pattern such as "*.ff.*"
    on_progress   called with how much is done, of how much, and what
    Raises        MezzotintError, before anything is painted if the request or a checkpoint cannot be
    """
    pair = open_pair(reference, candidate, model, prompts, image, seed, steps, layers, device, size, frames)
    tasks = [(side, name) for side in pair.sides for name in side.names]
    progress = Progress(steps * len(pair.prompts) + len(tasks), on_progress)
    recording = record(
        pair.reference,
        {side.component: side.quantized for side in pair.sides},
        pair.prompts,
        seed,
        pair.sampling,
        pair.device,
        lambda: progress("recording"),
    )
    measured = []
    for side, name in tasks:
        measured.append(measure(side, name, recording.of(side.component, name), pair.candidate, pair.device))
        progress(name)
    found = with_z(measured)
    suspects = [
        suspect for task, layer in zip(tasks, found, strict=True) for suspect in _judge(task, layer, found, pair.device)
    ]
    return Diagnosis(
        reference=pair.reference,
        candidate=pair.candidate,
        settings=pair.settings,
        suspects=tuple(sorted([*_impostors(pair.sides), *_one_a_layer(suspects)], key=lambda suspect: -suspect.score)),
        layers=tuple(found),
    )


def _one_a_layer(suspects: Sequence[Suspect]) -> list[Suspect]:
    """The suspects without the biases of layers that are suspects themselves."""
    layers = {suspect.module for suspect in suspects}
    return [suspect for suspect in suspects if suspect.module.removesuffix(".bias") not in layers - {suspect.module}]


def _judge(
    task: tuple[Side, str], layer: Layer, all_layers: Sequence[Layer], device: torch.device
) -> Iterator[Suspect]:
    """What is wrong with a layer: its weight, its input scale, its kernel, or else a product that stands out."""
    found = [*_weight(task, layer, all_layers, device), *_input(layer), *_kernel(layer)]
    yield from found or _product(layer)


def _weight(
    task: tuple[Side, str], layer: Layer, all_layers: Sequence[Layer], device: torch.device
) -> Iterator[Suspect]:
    side, name = task
    usual = usual_error(side, name)
    if layer.weight_error <= usual and layer.weight_z <= Z_LIMIT:
        return
    if layer.weight_error <= usual:
        usual = Z_RATIO * median(other.weight_error for other in all_layers if other.scheme == layer.scheme)
    cause = explain(side.suspicion(name, usual, device))
    score = min(layer.weight_error / usual, HIGHEST)
    if cause is None:
        said = f"the weight's error is {layer.weight_error:.3g}, where up to {usual:.3g} is usual"
        yield Suspect(layer.module, score, UNKNOWN, said)
    else:
        yield Suspect(layer.module, score, cause.cause, str(cause))


def _input(layer: Layer) -> Iterator[Suspect]:
    fault = input_fault([step.input for step in layer.steps if step.input is not None])
    if fault is not None:
        yield Suspect(layer.module, fault.score, fault.cause, fault.detail)


def _kernel(layer: Layer) -> Iterator[Suspect]:
    worst = max(layer.steps, key=lambda step: step.kernel_error, default=None)
    if worst is None or worst.kernel_error <= KERNEL_LIMIT:
        return
    if not worst.backend_error <= KERNEL_RATIO * worst.output_error:
        said = f"its product is {worst.kernel_error:.3g} from that of reference in step {worst.step}"
        yield Suspect(layer.module, worst.kernel_error / KERNEL_LIMIT, f"wrong product of {layer.backend}", said)


def _product(layer: Layer) -> Iterator[Suspect]:
    worst = max(layer.steps, key=lambda step: step.z, default=None)
    if worst is not None and worst.z > Z_LIMIT and worst.output_error > PRODUCT_LIMIT:
        said = f"the product's error {worst.output_error:.3g} stands out in step {worst.step} (z {worst.z:.1f})"
        yield Suspect(layer.module, worst.output_error / PRODUCT_LIMIT, UNKNOWN, said)


def _impostors(sides: Sequence[Side]) -> Iterator[Suspect]:
    """Transformers whose files say that they are quantized, and of which nothing is."""
    for side in sides:
        header, linears = side.candidate.header, side.candidate.contents.linears.values()
        claim = claim_of(header.path)
        if claim is not None and all(linear.scheme is BF16 for linear in linears):
            dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in header.tensors.values()})
            said = f"{claim} is claimed, and {header.path} holds {' and '.join(dtypes)} only"
            yield Suspect(side.component, HIGHEST, "not quantized at all", said)
