"""What it buys to restore one role of layers at a time to the reference's weights, and one step at a time to BF16
activations: which to keep so.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mezzotint.errors import BadRequest
from mezzotint.nn import quant_linears
from mezzotint.quality.calls import Answer, Calls, answer, record_calls
from mezzotint.quality.candidate import Candidate
from mezzotint.quality.finite import finite_values
from mezzotint.quality.layers import Side, role_of
from mezzotint.quality.pair import Progress, open_pair
from mezzotint.quality.step_sensitivity import StepGain, per_millisecond, schedule_for, step_gains
from mezzotint.schedule import StepSchedule
from mezzotint.schemes import BF16

SCHEMA = "mezzotint.sensitivity/2"
STEPS = 2


@dataclass(frozen=True)
class Gain:
    """One role of layers, restored.

    keep_bf16      the pattern for `convert --keep-bf16`
    bytes          how much more the layers take in BF16 than quantized
    milliseconds   how much longer a call of the transformer takes then; less than 0 where BF16 is faster
    error          relative error of the transformer's prediction then, mean over all steps
    fall           by how much that is less than with all layers quantized
    """

    component: str
    keep_bf16: str
    layers: int
    bytes: int
    milliseconds: float
    error: float
    fall: float

    @property
    def fall_per_mib(self) -> float:
        return self.fall / max(self.bytes, 1) * 2**20

    @property
    def fall_per_ms(self) -> float:
        return per_millisecond(self.fall, self.milliseconds)


@dataclass(frozen=True)
class Sensitivity:
    """What was found.

    error   {component: relative error of its predictions, all layers quantized}
    gains   all roles, the one that buys the most per byte first
    steps   what BF16 activations buy in each step; empty where no layer rounds its inputs
    """

    reference: Candidate
    candidate: Candidate
    settings: dict[str, Any]
    error: dict[str, float]
    gains: tuple[Gain, ...]
    steps: tuple[StepGain, ...]

    @property
    def by_millisecond(self) -> tuple[Gain, ...]:
        """The roles, the one that buys the most per millisecond first."""
        return tuple(sorted(self.gains, key=lambda gain: (-gain.fall_per_ms, -gain.fall)))

    @property
    def bf16_steps(self) -> StepSchedule | None:
        """The schedule for `generate --bf16-steps`, None if BF16 activations buy nothing."""
        return schedule_for(self.steps)

    def to_dict(self) -> dict[str, Any]:
        values = {
            "schema": SCHEMA,
            "reference": self.reference.to_dict(),
            "candidate": self.candidate.to_dict(),
            "settings": self.settings,
            "error": self.error,
            "keep_bf16": [gain.keep_bf16 for gain in self.gains if gain.fall > 0],
            "keep_bf16_by_ms": [gain.keep_bf16 for gain in self.by_millisecond if gain.fall > 0],
            "gains": [
                asdict(gain) | {"fall_per_mib": gain.fall_per_mib, "fall_per_ms": gain.fall_per_ms}
                for gain in self.gains
            ],
            "bf16_steps": None if self.bf16_steps is None else str(self.bf16_steps),
            "steps": [asdict(gain) | {"fall_per_ms": gain.fall_per_ms} for gain in self.steps],
        }
        return finite_values(values)


def sensitivity(
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
) -> Sensitivity:
    """Record the reference's predictions, and how near the candidate's come with each role of layers or step restored.

    Every prediction is from the reference's latents, so that steps do not add up. One model in memory at a time, and
    one role of the reference's layers. The arguments are those of `diagnose`.
    """
    pair = open_pair(reference, candidate, model, prompts, image, seed, steps, layers, device, size, frames)
    roles = [(side, role) for side in pair.sides for role in sorted({role_of(name) for name in _quantized(side)})]
    if not roles:
        raise BadRequest(
            "nothing of the candidate is quantized that --layers matches", "`mezzotint diagnose` says why."
        )
    progress = Progress(steps * len(pair.prompts) + len(roles) + steps, on_progress)
    calls = record_calls(pair, lambda: progress("recording"))
    pipe = pair.candidate.load(pair.device)
    transformers: dict[str, nn.Module] = {side.component: getattr(pipe, side.component) for side in pair.sides}
    whole = {name: answer(model, calls.of(name), pair.device) for name, model in transformers.items()}
    gains = []
    for side, role in roles:
        gains.append(_role_gain(side, role, transformers[side.component], calls, whole[side.component], pair.device))
        progress(role)
    by_step: tuple[StepGain, ...] = ()
    if any(map(_rounds_inputs, transformers.values())):
        by_step = step_gains(transformers, calls, pair.device, lambda step: progress(f"step {step}"))
    ranked = tuple(sorted(gains, key=lambda gain: -gain.fall_per_mib))
    errors = {name: answered.error for name, answered in whole.items()}
    return Sensitivity(pair.reference, pair.candidate, pair.settings, errors, ranked, by_step)


def _role_gain(
    side: Side, role: str, transformer: nn.Module, calls: Calls, before: Answer, device: torch.device
) -> Gain:
    names = [name for name in _quantized(side) if role_of(name) == role]
    extra = sum(_extra_bytes(transformer, name) for name in names)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_restored(transformer, side, name, device))
        after = answer(transformer, calls.of(side.component), device)
    longer, fall = after.milliseconds - before.milliseconds, before.error - after.error
    return Gain(side.component, role, len(names), extra, longer, after.error, fall)


def _rounds_inputs(transformer: nn.Module) -> bool:
    products = [product for layer in quant_linears(transformer).values() for product in layer.products]
    return any(product.decoder is not None for product in products)


def _quantized(side: Side) -> list[str]:
    """The layers that are not BF16 already: what a checkpoint has in BF16 and transformed is loaded as it was."""
    return [name for name in side.quantized if side.candidate.scheme(name) is not BF16]


@contextmanager
def _restored(transformer: nn.Module, side: Side, name: str, device: torch.device) -> Iterator[None]:
    """One layer with the reference's weight while the context is open."""
    weight, bias = side.expected(f"{name}.weight"), side.expected(f"{name}.bias")
    assert weight is not None  # noqa: S101
    quantized: Any = transformer.get_submodule(name)
    dtype = quantized.products[0].compute_dtype
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
    layer = quant_linears(transformer)[name]
    return layer.out_features * layer.in_features * torch.bfloat16.itemsize - sum(b.nbytes for b in layer.buffers())
