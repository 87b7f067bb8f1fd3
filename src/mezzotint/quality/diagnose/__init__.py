"""Diagnosis of a candidate: measure every layer and report suspects with their causes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Unpack

import torch

from mezzotint.quality.candidate import ModelSpec
from mezzotint.quality.input_scales import find_input_scale_problem
from mezzotint.quality.layers import Z_RATIO, LayerErrors, TransformerPair, measure, with_z
from mezzotint.quality.metrics.finite import finite_values
from mezzotint.quality.pair import PairSettings, Progress, open_pair
from mezzotint.quality.recording import record_inputs
from mezzotint.quality.resident import quantization_claim
from mezzotint.quality.signatures import explain
from mezzotint.quality.weights import expected_error
from mezzotint.schemes import BF16

SCHEMA = "mezzotint.diagnose/2"
KERNEL_LIMIT, KERNEL_RATIO = 0.02, 1.5
"""A backend is wrong if its error against `reference` exceeds the limit, and its error against BF16
exceeds the error of `reference` by the ratio."""
OUTPUT_ERROR_LIMIT = 0.25
"""Suspicious output error of a layer whose weight, input scale and kernel are right. Smaller errors
can be due to the distribution of the inputs."""
Z_LIMIT = 6.0
UNKNOWN = "unknown"
MAX_SCORE = 1e6
"""Score of a weight with NaN values, and of a file whose claim is false."""


@dataclass(frozen=True)
class Suspect:
    """A wrong layer and the cause. The score is the ratio of a measure to its usual value."""

    module: str
    score: float
    cause: str
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """The result of a diagnosis. Suspects are in order of decreasing score."""

    reference: ModelSpec
    candidate: ModelSpec
    settings: dict[str, Any]
    suspects: tuple[Suspect, ...]
    layers: tuple[LayerErrors, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the JSON report; docs/proof.md describes its keys."""
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
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
    **settings: Unpack[PairSettings],
) -> Diagnosis:
    """Compare each layer of the candidate with the reference's, and find the cause of errors.

    The reference generates, its layers' inputs are recorded, and the model is freed. The layers of
    the candidate are then read one at a time.

    reference, candidate   `[NAME=]SOURCE[,OPTION=VALUE...]`; see `parse_sources`
    on_progress   called with the number of finished items, the total and a description
    settings      prompts, steps, layers, device and more; see `PairSettings`
    Raises        MezzotintError; before anything is generated if the arguments cannot be used
    """
    models = open_pair(reference, candidate, **settings)
    steps = models.sampling.steps
    tasks = [(pair, name) for pair in models.transformers for name in pair.names]
    progress = Progress(steps * len(models.prompts) + len(tasks), on_progress)
    recording = record_inputs(
        models.reference,
        {pair.component: pair.quantized for pair in models.transformers},
        models.prompts,
        models.seed,
        models.sampling,
        models.device,
        lambda: progress("recording"),
    )
    measured = []
    for pair, name in tasks:
        samples = recording.samples_of(pair.component, name)
        measured.append(measure(pair, name, samples, models.candidate, models.device))
        progress(name)
    scored = with_z(measured)
    suspects = [*_unquantized_claims(models.transformers), *_suspects(tasks, scored, models.device)]
    return Diagnosis(
        reference=models.reference,
        candidate=models.candidate,
        settings=models.settings,
        suspects=tuple(sorted(suspects, key=lambda suspect: -suspect.score)),
        layers=tuple(scored),
    )


def _suspects(
    tasks: Sequence[tuple[TransformerPair, str]],
    layers: Sequence[LayerErrors],
    device: torch.device,
) -> list[Suspect]:
    suspects = [
        suspect
        for task, layer in zip(tasks, layers, strict=True)
        for suspect in _judge(task, layer, layers, device)
    ]
    return _drop_bias_duplicates(suspects)


def _drop_bias_duplicates(suspects: Sequence[Suspect]) -> list[Suspect]:
    """Remove the biases of layers that are suspects themselves."""
    layers = {suspect.module for suspect in suspects}
    return [
        suspect
        for suspect in suspects
        if suspect.module.removesuffix(".bias") not in layers - {suspect.module}
    ]


def _judge(
    task: tuple[TransformerPair, str],
    layer: LayerErrors,
    all_layers: Sequence[LayerErrors],
    device: torch.device,
) -> Iterator[Suspect]:
    """Yield the problems of a layer's weight, input scale and kernel.

    Without one of these, yield a problem if the output error is an outlier.
    """
    suspects = [
        *_wrong_weight(task, layer, all_layers, device),
        *_wrong_input_scale(layer),
        *_wrong_kernel(layer),
    ]
    yield from suspects or _output_outlier(layer)


def _wrong_weight(
    task: tuple[TransformerPair, str],
    layer: LayerErrors,
    all_layers: Sequence[LayerErrors],
    device: torch.device,
) -> Iterator[Suspect]:
    pair, name = task
    usual = expected_error(pair, name)
    if layer.weight_error <= usual and layer.weight_z <= Z_LIMIT:
        return
    if layer.weight_error <= usual:
        usual = Z_RATIO * median(
            other.weight_error for other in all_layers if other.scheme == layer.scheme
        )
    explanation = explain(pair.wrong_tensor(name, usual, device))
    score = min(layer.weight_error / usual, MAX_SCORE)
    if explanation is None:
        detail = f"the weight's error is {layer.weight_error:.3g}, and up to {usual:.3g} is usual"
        yield Suspect(layer.module, score, UNKNOWN, detail)
    else:
        yield Suspect(layer.module, score, explanation.cause, str(explanation))


def _wrong_input_scale(layer: LayerErrors) -> Iterator[Suspect]:
    ranges = [step.input for step in layer.steps if step.input is not None]
    problem = find_input_scale_problem(ranges)
    if problem is not None:
        yield Suspect(layer.module, problem.score, problem.cause, problem.detail)


def _wrong_kernel(layer: LayerErrors) -> Iterator[Suspect]:
    worst = max(layer.steps, key=lambda step: step.kernel_error, default=None)
    if worst is None or worst.kernel_error <= KERNEL_LIMIT:
        return
    # The condition is negated, so that NaN counts as wrong.
    if not worst.backend_error <= KERNEL_RATIO * worst.output_error:
        score = worst.kernel_error / KERNEL_LIMIT
        difference = f"{worst.kernel_error:.3g} in step {worst.step}"
        detail = f"its output differs from the reference backend's by {difference}"
        yield Suspect(layer.module, score, f"wrong output of {layer.backend}", detail)


def _output_outlier(layer: LayerErrors) -> Iterator[Suspect]:
    worst = max(layer.steps, key=lambda step: step.z, default=None)
    if worst is not None and worst.z > Z_LIMIT and worst.output_error > OUTPUT_ERROR_LIMIT:
        where = f"in step {worst.step} (z {worst.z:.1f})"
        detail = f"the output error {worst.output_error:.3g} is an outlier {where}"
        yield Suspect(layer.module, worst.output_error / OUTPUT_ERROR_LIMIT, UNKNOWN, detail)


def _unquantized_claims(pairs: Sequence[TransformerPair]) -> Iterator[Suspect]:
    """Yield the transformers whose files claim to be quantized and contain no quantized layer."""
    for pair in pairs:
        header, linears = pair.candidate.header, pair.candidate.contents.linears.values()
        claim = quantization_claim(header.path)
        if claim is not None and all(linear.scheme is BF16 for linear in linears):
            dtypes = sorted(
                {str(info.dtype).removeprefix("torch.") for info in header.tensors.values()}
            )
            detail = f"{claim} is claimed, and {header.path} contains only {' and '.join(dtypes)}"
            yield Suspect(pair.component, MAX_SCORE, "not quantized at all", detail)
