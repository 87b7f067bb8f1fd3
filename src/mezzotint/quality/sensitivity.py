"""Which layers to keep in BF16: what it buys to restore one role of layers at a time to the reference's weights."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.errors import BadRequest
from mezzotint.nn import quant_linears
from mezzotint.pipelines import paint
from mezzotint.quality.candidate import Candidate
from mezzotint.quality.layers import Side, role_of
from mezzotint.quality.pair import Pair, Progress, finite_values, open_pair
from mezzotint.quality.signatures import relative_error
from mezzotint.schemes import BF16

SCHEMA = "mezzotint.sensitivity/1"
STEPS = 2


@dataclass(frozen=True)
class Gain:
    """One role of layers, restored.

    keep_bf16   the pattern for `convert --keep-bf16`
    bytes       how much more the layers take in BF16 than quantized
    error       relative error of the transformer's prediction then, mean over all steps
    fall        by how much that is less than with all layers quantized
    """

    component: str
    keep_bf16: str
    layers: int
    bytes: int
    error: float
    fall: float

    @property
    def fall_per_mib(self) -> float:
        return self.fall / max(self.bytes, 1) * 2**20


@dataclass(frozen=True)
class Sensitivity:
    """All roles, the one that buys the most per byte first; `error` is {component: its error, all layers quantized}."""

    reference: Candidate
    candidate: Candidate
    settings: dict[str, Any]
    error: dict[str, float]
    gains: tuple[Gain, ...]

    def to_dict(self) -> dict[str, Any]:
        values = {
            "schema": SCHEMA,
            "reference": self.reference.to_dict(),
            "candidate": self.candidate.to_dict(),
            "settings": self.settings,
            "error": self.error,
            "keep_bf16": [gain.keep_bf16 for gain in self.gains if gain.fall > 0],
            "gains": [asdict(gain) | {"fall_per_mib": gain.fall_per_mib} for gain in self.gains],
        }
        return finite_values(values)


@dataclass(frozen=True)
class Call:
    """One call of a transformer; tensors are on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prediction: Tensor


def sensitivity(
    reference: str,
    candidate: str,
    *,
    model: str | None = None,
    prompts: str | None = None,
    seed: int = 0,
    steps: int = STEPS,
    layers: str = "*",
    device: str | torch.device | None = None,
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
) -> Sensitivity:
    """Record the reference's predictions, and how near the candidate's come with each role of layers restored.

    Every prediction is from the reference's latents, so that steps do not add up. One model in memory at a time, and
    one role of the reference's layers. The arguments are those of `diagnose`.
    """
    pair = open_pair(reference, candidate, model, prompts, seed, steps, layers, device)
    roles = [(side, role) for side in pair.sides for role in sorted({role_of(name) for name in _quantized(side)})]
    if not roles:
        raise BadRequest(
            "nothing of the candidate is quantized that --layers matches", "`mezzotint diagnose` says why."
        )
    progress = Progress(steps * len(pair.prompts) + len(roles), on_progress)
    calls = _predictions(pair, lambda: progress("recording"))
    pipe = pair.candidate.load(pair.device)
    error: dict[str, float] = {}
    gains = []
    for side, role in roles:
        transformer = getattr(pipe, side.component)
        before = error.setdefault(side.component, _error(transformer, calls[side.component], pair.device))
        names = [name for name in _quantized(side) if role_of(name) == role]
        extra = sum(_extra_bytes(transformer, name) for name in names)
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(_restored(transformer, side, name, pair.device))
            after = _error(transformer, calls[side.component], pair.device)
        gains.append(Gain(side.component, role, len(names), extra, after, before - after))
        progress(role)
    ranked = tuple(sorted(gains, key=lambda gain: -gain.fall_per_mib))
    return Sensitivity(pair.reference, pair.candidate, pair.settings, error, ranked)


def _quantized(side: Side) -> list[str]:
    """The layers that are not BF16 already: what a checkpoint has in BF16 and transformed is loaded as it was."""
    linears = side.candidate.linears
    return [name for name in side.quantized if side.candidate.stored(linears[name][0].source).scheme is not BF16]


def _predictions(pair: Pair, on_step: Callable[[], None]) -> dict[str, list[Call]]:
    """{component: its calls while the reference paints}; the model is freed afterwards."""
    pipe = pair.reference.load(pair.device)
    calls: dict[str, list[Call]] = {side.component: [] for side in pair.sides}

    def keep(component: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            cpu = torch.device("cpu")
            calls[component].append(Call(_moved(args, cpu), _moved(kwargs, cpu), _joined(output).cpu()))

        return look

    handles = [getattr(pipe, component).register_forward_hook(keep(component), with_kwargs=True) for component in calls]
    paint(
        pipe,
        pair.prompts,
        [pair.seed] * len(pair.prompts),
        pair.sampling,
        lambda _step, _latents: on_step(),
        guard=False,
    )
    for handle in handles:
        handle.remove()
    del pipe
    gc.collect()  # as in runs.py: the candidate is to find the memory free
    return calls


@torch.no_grad()
def _error(transformer: nn.Module, calls: Sequence[Call], device: torch.device) -> float:
    """Relative error of the predictions, mean over the calls; 0 where there are none."""
    errors = []
    for call in calls:
        prediction = _joined(transformer(*_moved(call.args, device), **_moved(call.kwargs, device)))
        errors.append(relative_error(prediction.cpu(), call.prediction))
    return sum(errors) / max(len(errors), 1)


@contextmanager
def _restored(transformer: nn.Module, side: Side, name: str, device: torch.device) -> Iterator[None]:
    """One layer with the reference's weight while the context is open."""
    weight, bias = side.expected(f"{name}.weight"), side.expected(f"{name}.bias")
    assert weight is not None  # noqa: S101
    parent, _, leaf = name.rpartition(".")
    place = transformer.get_submodule(parent)
    quantized = getattr(place, leaf)
    dtype = quantized.products[0].compute_dtype
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    for part, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(layer, part, nn.Parameter(value.to(device, dtype), requires_grad=False))
    setattr(place, leaf, layer)
    try:
        yield
    finally:
        setattr(place, leaf, quantized)


def _extra_bytes(transformer: nn.Module, name: str) -> int:
    layer = quant_linears(transformer)[name]
    return layer.out_features * layer.in_features * torch.bfloat16.itemsize - sum(b.nbytes for b in layer.buffers())


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
