"""From a header to a model: a plan that accounts for every tensor, then the reading.

`plan` raises before a byte of a tensor is read. `load` carries the plan out and says what it did.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from mezzotint.blank import BLANK_WEIGHT, is_blank, why_blank
from mezzotint.checkpoint import Checkpoint
from mezzotint.costs import resident_bytes
from mezzotint.errors import BadRequest, listed, there_are
from mezzotint.fusion import guard_fusion
from mezzotint.hub import AnyPath
from mezzotint.kernels import (
    ACTIVATIONS,
    AS_STORED,
    BackendChoice,
    BackendUse,
    WeightSpec,
    asked_for,
    check_choice,
    count_uses,
)
from mezzotint.kernels.verified import NOT_VERIFIED
from mezzotint.nn import QuantLinear, SplitLinear, linear_of, quant_linears
from mezzotint.residency import resident_form, settle
from mezzotint.schemes import BF16, FP8
from mezzotint.tensor import QuantTensor, real_weight


@dataclass(frozen=True)
class LoadPlan:
    """A checkpoint that has been held against a model: every tensor has its place. Nothing has been read."""

    checkpoint: Checkpoint
    activations: str


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, from what, and who will run it.

    evidence          why the format was recognised; `declined` is why each other format was not
    tensors_used      how many stored tensors are in the model
    ignored           {tensor: reason}
    resident_bytes    {dtype: bytes} of the model's parameters and buffers
    events            everything that changes speed or numbers
    """

    path: AnyPath
    format: str
    evidence: str
    declined: Mapping[str, str]
    tensors_used: int
    ignored: Mapping[str, str]
    resident_bytes: Mapping[str, int]
    backends: tuple[BackendUse, ...]
    events: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        return "\n".join(_report_lines(self))


def plan(checkpoint: Checkpoint, model: nn.Module, activations: str = AS_STORED) -> LoadPlan:
    """Pair every stored tensor with a place in `model`, which may be on the meta device.

    Raises  BadRequest, MissingTensor, UnexpectedTensor, ShapeMismatch, UnknownFormat
    """
    if activations not in ACTIVATIONS:
        raise BadRequest(f"activations is {activations!r}", there_are(activations, ACTIVATIONS))
    if activations != AS_STORED:
        checkpoint = checkpoint.without_input_scales()
    return LoadPlan(checkpoint.placed(model), activations)


def load(
    plan: LoadPlan,
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    backend: BackendChoice = None,
    resident: str | None = None,
) -> LoadReport:
    """Fill `model` in place: quantized linears replaced by QuantLinear, everything else cast to `dtype` on `device`.

    Modules that the model's class keeps in float32 stay so. Scales keep the dtype that the file gives them.

    backend    name of the one backend to use, {scheme: name}, or None for the best
    resident   "stored", "fp8", or None: see `mezzotint.residency.settle`
    """
    check_choice(backend)
    plan.checkpoint.header.fetch()
    blank = insert_linears(plan, model, device, dtype, backend, resident)
    for name in plan.checkpoint.plain:
        value = plan.checkpoint.tensor(name)
        if is_blank(name, value):
            blank[name] = BLANK_WEIGHT
        _assign(model, name, value.to(device, _dtype_of(model, name, dtype)))
    return report(plan, model, blank)


def insert_linears(
    plan: LoadPlan,
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    backend: BackendChoice = None,
    resident: str | None = None,
) -> dict[str, str]:
    """Replace each nn.Linear that the checkpoint holds quantized by a QuantLinear or SplitLinear, its weights read.

    Returns   {layer that is blank: why}, as `verify` would say
    """
    blank: dict[str, str] = {}
    kept = settle(resident, *_weights_of(plan.checkpoint), device, plan.activations, backend)
    for name in plan.checkpoint.linears:
        pieces = plan.checkpoint.read(name)
        if why := next(filter(None, map(why_blank, pieces)), ""):
            blank[name] = why
        if pieces[0].scheme is BF16 or name in plan.checkpoint.unquantized:
            _restore(model, name, pieces, device, dtype)
            continue
        only = asked_for(backend, pieces[0].scheme)
        pieces = [resident_form(piece.to(device), kept, plan.activations) for piece in pieces]
        own_dtype = _dtype_of(model, name, dtype)
        model.set_submodule(name, linear_of(pieces, own_dtype, plan.activations, only))
    guard_fusion(model)
    return blank


def _weights_of(checkpoint: Checkpoint) -> tuple[list[WeightSpec], int]:
    """The quantized layers as far as a choice of kernel depends on them, and the bytes of everything else in BF16."""
    quantized, numbers = [], 0
    for name in checkpoint.linears:
        pieces = checkpoint.outline(name).pieces
        if pieces[0].scheme is BF16 or name in checkpoint.unquantized:
            numbers += sum(math.prod(piece.shape) for piece in pieces)
        else:
            quantized += [WeightSpec.of(piece) for piece in pieces]
    numbers += sum(math.prod(checkpoint.shape(name)) for name in checkpoint.plain)
    return quantized, numbers * torch.bfloat16.itemsize


def _restore(
    model: nn.Module, name: str, pieces: Sequence[QuantTensor], device: torch.device, dtype: torch.dtype
) -> None:
    """Fill an ordinary module with the weights that the pieces of a transformed or quantized one stand for."""
    values = {"weight": real_weight(pieces), "bias": pieces[0].scheme.real_bias(pieces[0].parts)}
    for leaf, value in values.items():
        if value is not None:
            place = f"{name}.{leaf}"
            _assign(model, place, value.to(device, _dtype_of(model, place, dtype)))


def report(plan: LoadPlan, model: nn.Module, blank: Mapping[str, str] | None = None) -> LoadReport:
    """What `model`, filled by this plan, holds and will run on; `blank` is what `insert_linears` returned."""
    backends = _backend_uses(model)
    header, recognised = plan.checkpoint.header, plan.checkpoint.recognised
    return LoadReport(
        path=header.path,
        format=recognised.format.title,
        evidence=plan.checkpoint.evidence,
        declined=recognised.declined,
        tensors_used=len(header.tensors.keys() - plan.checkpoint.ignored.keys()),
        ignored=plan.checkpoint.ignored,
        resident_bytes=resident_bytes([model]),
        backends=backends,
        events=(
            *header.notes,
            *plan.checkpoint.contradictions,
            *_blank(blank or {}),
            *_events(plan, backends),
            *_turned_into_fp8(plan, model),
        ),
    )


def _dtype_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the model's class wants this tensor; diffusers marks what must stay float32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    return torch.float32 if set(kept) & set(name.split(".")) else dtype


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(leaf, value)


def _backend_uses(model: nn.Module) -> tuple[BackendUse, ...]:
    """The choices of backend in `model`, equal ones counted together; a layer whose pieces differ counts for each."""
    return count_uses(use for layer in quant_linears(model).values() for use in _uses_of(layer))


def _uses_of(layer: QuantLinear | SplitLinear) -> Iterator[BackendUse]:
    uses = count_uses(BackendUse.of(product.scheme, product.selection) for product in layer.products)
    return (replace(use, layers=1) for use in uses)


def _events(plan: LoadPlan, backends: tuple[BackendUse, ...]) -> Iterator[str]:
    for use in backends:
        if use.backend == "reference":
            yield f"{use.layers} {use.scheme} layers run on the slow reference backend ({use.why})"
        if use.backend == "expand":
            yield f"{use.layers} {use.scheme} layers round their inputs to FP8, where the checkpoint means 4 bits"
        if not use.verified:
            yield f"{use.layers} {use.scheme} layers run on {use.backend}, {NOT_VERIFIED}: never run on such a GPU yet"
    linears = plan.checkpoint.contents.linears.values()
    if plan.activations != AS_STORED and linears:
        yield "inputs stay unquantized on request; the checkpoint's input scales are not used"
    quantized = [linear for linear in linears if linear.scheme is not BF16]
    without = [linear for linear in quantized if linear.scheme.quantize_input and not linear.quantizes_input]
    if plan.activations == AS_STORED and without:
        yield f"{len(without)} quantized layers have no input scale in the file; their inputs stay unquantized"
    dynamic = [linear for linear in quantized if linear.dynamic_input and linear.scheme.static_input not in linear.keys]
    if dynamic:
        yield f"{len(dynamic)} quantized layers have no input scale in the file; theirs is computed at each call"
    if plan.checkpoint.unquantized:
        names = listed(sorted(plan.checkpoint.unquantized))
        yield f"{names}: stored quantized, and no linear layer of the model; decoded weights are loaded"
    if len(quantized) < len(linears):
        yield f"{len(linears) - len(quantized)} BF16 layers are stored transformed; their effective weights are loaded"


def _blank(blank: Mapping[str, str]) -> Iterator[str]:
    """One event for each way of being blank: is the file damaged?"""
    for why in dict.fromkeys(blank.values()):
        names = [name for name, reason in blank.items() if reason == why]
        yield f"suspicious: {listed(names)}: {why}; `mezzotint verify` checks the file"


def _turned_into_fp8(plan: LoadPlan, model: nn.Module) -> Iterator[str]:
    checkpoint = plan.checkpoint
    turned = [
        name
        for name, layer in quant_linears(model).items()
        if layer.products[0].scheme is FP8 and name in checkpoint.linears and checkpoint.scheme(name) is not FP8
    ]
    if turned:
        yield f"{len(turned)} layers of 4 bits became FP8, one scale a row; their inputs are rounded to FP8"


def _report_lines(report: LoadReport) -> Iterator[str]:
    yield f"{report.path}: {report.format}"
    yield f"  because {report.evidence}"
    yield f"  {report.tensors_used} tensors used, {len(report.ignored)} ignored"
    resident = ", ".join(f"{dtype} {size / 2**20:.1f} MiB" for dtype, size in report.resident_bytes.items())
    yield f"  resident: {resident}"
    for use in report.backends:
        yield f"  {use.layers} {use.scheme} layers on {use.backend}{'' if use.verified else f', {NOT_VERIFIED}'}"
    for event in report.events:
        yield f"  note: {event}"
