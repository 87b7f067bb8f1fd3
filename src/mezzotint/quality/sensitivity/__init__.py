"""Sensitivity: how much the error decreases if one role of layers is kept in BF16, or one step runs
with BF16 activations.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Unpack

import torch
from torch import nn

from mezzotint.errors import BadRequest
from mezzotint.generation.schedule import StepSchedule
from mezzotint.nn import quant_linears
from mezzotint.quality.candidate import ModelSpec
from mezzotint.quality.layers import TransformerPair, role_of
from mezzotint.quality.metrics.finite import finite_values
from mezzotint.quality.pair import PairSettings, Progress, open_pair
from mezzotint.quality.sensitivity.recorded_calls import (
    Calls,
    PredictionError,
    evaluate_calls,
    record_calls,
)
from mezzotint.quality.sensitivity.steps import StepGain, per_ms, schedule_for, step_gains
from mezzotint.schemes import BF16

SCHEMA = "mezzotint.sensitivity/3"


@dataclass(frozen=True)
class RoleGain:
    """The effect of keeping one role of layers in BF16.

    keep_bf16         glob for `convert --keep-bf16`
    bytes             additional bytes of the layers in BF16
    milliseconds      additional time of a transformer call; negative if BF16 is faster
    error             relative error of the transformer's prediction, mean over all steps
    error_reduction   decrease of the error compared with all layers quantized
    """

    component: str
    keep_bf16: str
    layers: int
    bytes: int
    milliseconds: float
    error: float
    error_reduction: float

    @property
    def error_reduction_per_mib(self) -> float:
        """Return the error reduction per additional MiB."""
        return self.error_reduction / max(self.bytes, 1) * 2**20

    @property
    def error_reduction_per_ms(self) -> float:
        """Return the error reduction per additional millisecond."""
        return per_ms(self.error_reduction, self.milliseconds)

    def to_dict(self) -> dict[str, Any]:
        """Return the gain as JSON."""
        return asdict(self) | {
            "error_reduction_per_mib": self.error_reduction_per_mib,
            "error_reduction_per_ms": self.error_reduction_per_ms,
        }


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of a candidate.

    error   {component: relative error of its predictions with all layers quantized}
    gains   one per role, in order of decreasing error reduction per byte
    steps   effect of BF16 activations per step; empty if no layer quantizes its activations
    """

    reference: ModelSpec
    candidate: ModelSpec
    settings: dict[str, Any]
    error: dict[str, float]
    gains: tuple[RoleGain, ...]
    steps: tuple[StepGain, ...]

    @property
    def by_millisecond(self) -> tuple[RoleGain, ...]:
        """Return the roles in order of decreasing error reduction per millisecond."""
        return tuple(
            sorted(
                self.gains, key=lambda gain: (-gain.error_reduction_per_ms, -gain.error_reduction)
            )
        )

    @property
    def bf16_steps(self) -> StepSchedule | None:
        """Return the schedule for `generate --bf16-steps`; None if none reduces the error."""
        return schedule_for(self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the JSON report; docs/proof.md describes its keys."""
        values = {
            "schema": SCHEMA,
            "reference": self.reference.to_dict(),
            "candidate": self.candidate.to_dict(),
            "settings": self.settings,
            "error": self.error,
            "keep_bf16": [gain.keep_bf16 for gain in self.gains if gain.error_reduction > 0],
            "keep_bf16_by_ms": [
                gain.keep_bf16 for gain in self.by_millisecond if gain.error_reduction > 0
            ],
            "gains": [gain.to_dict() for gain in self.gains],
            "bf16_steps": None if self.bf16_steps is None else str(self.bf16_steps),
            "steps": [gain.to_dict() for gain in self.steps],
        }
        return finite_values(values)


def sensitivity(
    reference: str,
    candidate: str,
    *,
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
    **settings: Unpack[PairSettings],
) -> Sensitivity:
    """Measure how much each role of layers, and each step, contributes to a candidate's error.

    The reference's transformer calls are recorded. The candidate then computes the same calls, with
    one role of layers restored to the reference's weights, or one step with BF16 activations. All
    calls start from the reference's latents, so that errors do not accumulate over steps. One model
    is in memory at a time. The arguments are the arguments of `diagnose`; see `PairSettings`.

    Raises   MezzotintError; BadRequest if no selected layer is quantized
    """
    models = open_pair(reference, candidate, **settings)
    steps = models.sampling.steps
    roles = [
        (pair, role)
        for pair in models.transformers
        for role in sorted({role_of(name) for name in _quantized(pair)})
    ]
    if not roles:
        raise BadRequest(
            "no layer of the candidate that matches --layers is quantized",
            "`mezzotint diagnose` finds the cause.",
        )
    progress = Progress(steps * len(models.prompts) + len(roles) + steps, on_progress)
    calls = record_calls(models, lambda: progress("recording"))
    pipe = models.candidate.load(models.device).pipe
    transformers: dict[str, nn.Module] = {
        pair.component: getattr(pipe, pair.component) for pair in models.transformers
    }
    quantized = {
        name: evaluate_calls(transformer, calls.for_component(name), models.device)
        for name, transformer in transformers.items()
    }
    gains = []
    for pair, role in roles:
        name = pair.component
        gains.append(
            _role_gain(pair, role, transformers[name], calls, quantized[name], models.device)
        )
        progress(role)
    by_step: tuple[StepGain, ...] = ()
    if any(map(_quantizes_activations, transformers.values())):
        by_step = step_gains(
            transformers, calls, models.device, lambda step: progress(f"step {step}")
        )
    ranked = tuple(sorted(gains, key=lambda gain: -gain.error_reduction_per_mib))
    errors = {name: prediction.error for name, prediction in quantized.items()}
    return Sensitivity(models.reference, models.candidate, models.settings, errors, ranked, by_step)


def _role_gain(
    pair: TransformerPair,
    role: str,
    transformer: nn.Module,
    calls: Calls,
    quantized: PredictionError,
    device: torch.device,
) -> RoleGain:
    names = [name for name in _quantized(pair) if role_of(name) == role]
    extra_bytes = sum(_extra_bytes(transformer, name) for name in names)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_with_reference_weight(transformer, pair, name, device))
        restored = evaluate_calls(transformer, calls.for_component(pair.component), device)
    return RoleGain(
        component=pair.component,
        keep_bf16=role,
        layers=len(names),
        bytes=extra_bytes,
        milliseconds=restored.milliseconds - quantized.milliseconds,
        error=restored.error,
        error_reduction=quantized.error - restored.error,
    )


def _quantizes_activations(transformer: nn.Module) -> bool:
    sublayers = [
        sublayer for layer in quant_linears(transformer).values() for sublayer in layer.sublayers
    ]
    return any(sublayer.bf16_activation_backend is not None for sublayer in sublayers)


def _quantized(pair: TransformerPair) -> list[str]:
    """Return the quantized layers, without layers that are stored transformed in BF16."""
    return [name for name in pair.quantized if pair.candidate.scheme(name) is not BF16]


@contextmanager
def _with_reference_weight(
    transformer: nn.Module, pair: TransformerPair, name: str, device: torch.device
) -> Iterator[None]:
    """Give one layer the reference's weight while the context is open."""
    weight, bias = pair.reference_tensor(f"{name}.weight"), pair.reference_tensor(f"{name}.bias")
    assert weight is not None  # noqa: S101
    quantized: Any = transformer.get_submodule(name)
    dtype = quantized.sublayers[0].compute_dtype
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    for part, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(layer, part, nn.Parameter(value.to(device, dtype), requires_grad=False))
    transformer.set_submodule(name, layer)
    try:
        yield
    finally:
        transformer.set_submodule(name, quantized)


def _extra_bytes(transformer: nn.Module, name: str) -> int:
    """Return how many more bytes a layer takes in BF16 than quantized."""
    layer = quant_linears(transformer)[name]
    bf16_bytes = layer.out_features * layer.in_features * torch.bfloat16.itemsize
    return bf16_bytes - sum(buffer.nbytes for buffer in layer.buffers())
