"""From a header to a model: a plan that accounts for every tensor, then the reading.

`plan` raises before a byte of a tensor is read. `load` carries the plan out and says what it did.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mezzotint.errors import BadRequest, MissingTensor, ShapeMismatch, UnexpectedTensor
from mezzotint.formats import Header, Recognised, StoredLinear, recognise
from mezzotint.kernels import ACTIVATIONS, AS_STORED
from mezzotint.nn import QuantLinear, quant_linears

MAX_NAMED = 4
"""How many names an error spells out."""


@dataclass(frozen=True)
class LoadPlan:
    """Which tensor becomes which part of the model; made from headers and a meta-device model alone.

    linears   {module: StoredLinear}
    plain     {parameter or buffer: key}
    ignored   {key: reason}
    """

    header: Header
    recognised: Recognised
    linears: Mapping[str, StoredLinear]
    plain: Mapping[str, str]
    ignored: Mapping[str, str]
    activations: str


@dataclass(frozen=True)
class BackendUse:
    """One choice of backend, and how many layers share it; `declined` is {backend: reason}."""

    scheme: str
    backend: str
    layers: int
    declined: Mapping[str, str]


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, from what, and who will run it.

    evidence          why the format was recognised; `declined` is why each other format was not
    tensors_used      how many stored tensors are in the model
    ignored           {tensor: reason}
    resident_bytes    {dtype: bytes} of the model's parameters and buffers
    events            everything that changes speed or numbers
    """

    path: Path
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


def plan(header: Header, model: nn.Module, activations: str = AS_STORED) -> LoadPlan:
    """Pair every stored tensor with a place in `model`, which may be on the meta device.

    Raises  BadRequest, UnknownFormat, MissingTensor, UnexpectedTensor, ShapeMismatch
    """
    if activations not in ACTIVATIONS:
        raise BadRequest(f"activations is {activations!r}", f"there are: {', '.join(ACTIVATIONS)}.")
    recognised = recognise(header)
    contents = recognised.format.contents(header)
    linears = {name: _planned(linear, header, model, activations) for name, linear in contents.linears.items()}
    plain = {key: key for key in contents.plain}
    _account(header, model, linears, plain)
    return LoadPlan(header, recognised, linears, plain, contents.ignored, activations)


def load(
    plan: LoadPlan, model: nn.Module, device: torch.device, dtype: torch.dtype, backend: str | None = None
) -> LoadReport:
    """Fill `model` in place: quantized linears replaced by QuantLinear, everything else cast to `dtype` on `device`.

    Modules that the model's class keeps in float32 stay so. Scales keep the dtype that the file gives them.
    """
    insert_linears(plan, model, device, dtype, backend)
    for name, key in plan.plain.items():
        _assign(model, name, plan.header.tensors[key].read().to(device, _dtype_of(model, name, dtype)))
    return report(plan, model)


def insert_linears(
    plan: LoadPlan, model: nn.Module, device: torch.device, dtype: torch.dtype, backend: str | None = None
) -> None:
    """Replace each planned nn.Linear by a QuantLinear with its weights read; a bias stays to be assigned."""
    for name, linear in plan.linears.items():
        stored = linear.read(plan.header)
        weight = stored.with_parts({part: value.to(device) for part, value in stored.parts.items()}, stored.layout)
        original = model.get_submodule(name)
        bias = None if original.bias is None else torch.empty(linear.shape[0], dtype=dtype, device=device)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantLinear(weight, bias, plan.activations, backend))


def report(plan: LoadPlan, model: nn.Module) -> LoadReport:
    """What `model`, filled by this plan, holds and will run on."""
    resident: Counter[str] = Counter()
    for tensor in (*model.parameters(), *model.buffers()):
        resident[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    backends = _backend_uses(model)
    return LoadReport(
        path=plan.header.path,
        format=plan.recognised.format.title,
        evidence=plan.recognised.evidence,
        declined=plan.recognised.declined,
        tensors_used=sum(len(linear.keys) for linear in plan.linears.values()) + len(plan.plain),
        ignored=plan.ignored,
        resident_bytes=dict(sorted(resident.items())),
        backends=backends,
        events=(*plan.header.notes, *_events(plan, backends)),
    )


def _planned(linear: StoredLinear, header: Header, model: nn.Module, activations: str) -> StoredLinear:
    """The linear as it will be read: checked, of the model's shape, without an input scale that will not be used."""
    if activations != AS_STORED:
        linear = replace(linear, keys={p: k for p, k in linear.keys.items() if p != linear.scheme.static_input})
    linear.check(header)
    module = dict(model.named_modules()).get(linear.module)
    if module is None:
        raise UnexpectedTensor(f"{header.path}: holds a quantized layer {linear.module}, and the model has none such")
    if not isinstance(module, nn.Linear) or (module.out_features, module.in_features) != linear.shape:
        raise ShapeMismatch(
            f"{header.path}: {linear.module} is {linear.scheme.title} of {linear.shape[0]} x {linear.shape[1]}, "
            f"expected {module}"
        )
    return linear


def _account(header: Header, model: nn.Module, linears: Mapping[str, StoredLinear], plain: Mapping[str, str]) -> None:
    """Every place in the model has one source, and every source one place."""
    quantized = {f"{name}.weight" for name in linears}
    places = {name: value for name, value in model.state_dict().items() if name not in quantized}
    missing = [name for name in places if name not in plain]
    if missing:
        raise MissingTensor(
            f"{header.path}: {_some(missing)} not there, and the model needs {_them(missing)}",
            "is this a checkpoint of the same model, and complete?",
        )
    extra = [name for name in plain if name not in places]
    if extra:
        raise UnexpectedTensor(
            f"{header.path}: {_some(extra)} left over; the model has no place for {_them(extra)}",
            "a scale without its quantized weight, or a checkpoint of another model, looks like this.",
        )
    for name, key in plain.items():
        if header.tensors[key].shape != tuple(places[name].shape):
            raise ShapeMismatch(
                f"{header.tensors[key].file}: {key} has shape {list(header.tensors[key].shape)}, "
                f"expected {list(places[name].shape)}"
            )


def _some(names: list[str]) -> str:
    listed = ", ".join(names[:MAX_NAMED])
    if len(names) == 1:
        return f"{listed} is"
    return f"{listed}{f' and {len(names) - MAX_NAMED} more' if len(names) > MAX_NAMED else ''} are"


def _them(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"


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
    """The choices of backend in `model`, equal ones counted together."""
    uses: list[BackendUse] = []
    for layer in quant_linears(model).values():
        use = BackendUse(layer.scheme.name, layer.selection.backend.name, 1, layer.selection.declined)
        same = next((i for i, u in enumerate(uses) if replace(u, layers=1) == use), None)
        if same is None:
            uses.append(use)
        else:
            uses[same] = replace(uses[same], layers=uses[same].layers + 1)
    return tuple(uses)


def _events(plan: LoadPlan, backends: tuple[BackendUse, ...]) -> Iterator[str]:
    for use in backends:
        if use.backend == "reference":
            reasons = "; ".join(f"{name} {why}" for name, why in use.declined.items())
            yield f"{use.layers} {use.scheme} layers run on the slow reference backend ({reasons})"
    if plan.activations != AS_STORED and plan.linears:
        yield "inputs stay unquantized on request; the checkpoint's input scales are not used"
    without = [linear for linear in plan.linears.values() if linear.scheme.static_input not in linear.keys]
    if plan.activations == AS_STORED and without:
        yield f"{len(without)} quantized layers have no input scale in the file; their inputs stay unquantized"


def _report_lines(report: LoadReport) -> Iterator[str]:
    yield f"{report.path}: {report.format}"
    yield f"  because {report.evidence}"
    yield f"  {report.tensors_used} tensors used, {len(report.ignored)} ignored"
    resident = ", ".join(f"{dtype} {size / 2**20:.1f} MiB" for dtype, size in report.resident_bytes.items())
    yield f"  resident: {resident}"
    for use in report.backends:
        yield f"  {use.layers} {use.scheme} layers on {use.backend}"
    for event in report.events:
        yield f"  note: {event}"
