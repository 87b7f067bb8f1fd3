"""From a header to a model: a plan that accounts for every tensor, then the reading.

`plan` raises before a byte of a tensor is read. `load` carries the plan out and says what it did.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import BadRequest, MissingTensor, ShapeMismatch, UnexpectedTensor
from mezzotint.hub import AnyPath
from mezzotint.kernels import ACTIVATIONS, AS_STORED
from mezzotint.nn import QuantLinear, quant_linears

MAX_NAMED = 4
"""How many names an error spells out."""


@dataclass(frozen=True)
class LoadPlan:
    """A checkpoint that has been held against a model: every tensor has its place. Nothing has been read."""

    checkpoint: Checkpoint
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

    Raises  BadRequest, MissingTensor, UnexpectedTensor, ShapeMismatch
    """
    if activations not in ACTIVATIONS:
        raise BadRequest(f"activations is {activations!r}", f"there are: {', '.join(ACTIVATIONS)}.")
    if activations != AS_STORED:
        checkpoint = checkpoint.without_input_scales()
    for linear in checkpoint.contents.linears.values():
        linear.check(checkpoint.header)
    _account(checkpoint, model)
    return LoadPlan(checkpoint, activations)


def load(
    plan: LoadPlan, model: nn.Module, device: torch.device, dtype: torch.dtype, backend: str | None = None
) -> LoadReport:
    """Fill `model` in place: quantized linears replaced by QuantLinear, everything else cast to `dtype` on `device`.

    Modules that the model's class keeps in float32 stay so. Scales keep the dtype that the file gives them.
    """
    plan.checkpoint.header.fetch()
    insert_linears(plan, model, device, dtype, backend)
    for name in plan.checkpoint.plain:
        _assign(model, name, plan.checkpoint.tensor(name).to(device, _dtype_of(model, name, dtype)))
    return report(plan, model)


def insert_linears(
    plan: LoadPlan, model: nn.Module, device: torch.device, dtype: torch.dtype, backend: str | None = None
) -> None:
    """Replace each nn.Linear that the checkpoint holds quantized by a QuantLinear, its weights read."""
    for name in plan.checkpoint.linears:
        (weight,) = plan.checkpoint.read(name)
        parent, _, leaf = name.rpartition(".")
        layer = QuantLinear(weight.to(device), _dtype_of(model, name, dtype), plan.activations, backend)
        setattr(model.get_submodule(parent), leaf, layer)


def report(plan: LoadPlan, model: nn.Module) -> LoadReport:
    """What `model`, filled by this plan, holds and will run on."""
    resident: Counter[str] = Counter()
    for tensor in (*model.parameters(), *model.buffers()):
        resident[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    backends = _backend_uses(model)
    header, recognised = plan.checkpoint.header, plan.checkpoint.recognised
    return LoadReport(
        path=header.path,
        format=recognised.format.title,
        evidence=recognised.evidence,
        declined=recognised.declined,
        tensors_used=len(header.tensors) - len(plan.checkpoint.ignored),
        ignored=plan.checkpoint.ignored,
        resident_bytes=dict(sorted(resident.items())),
        backends=backends,
        events=(*header.notes, *_events(plan, backends)),
    )


def _account(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Every place in the model has one source of its shape, and every source a place."""
    places = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    sources = {name: checkpoint.shape(name) for name in checkpoint.plain}
    for module in checkpoint.linears:
        sources |= {f"{module}.{name}": shape for name, shape in checkpoint.linear_shapes(module).items()}
    path = checkpoint.header.path
    missing = [name for name in places if name not in sources]
    if missing:
        raise MissingTensor(
            f"{path}: {_some(missing)} not there, and the model needs {_them(missing)}",
            "is this a checkpoint of the same model, and complete?",
        )
    extra = [name for name in sources if name not in places] + checkpoint.unplaced
    if extra:
        raise UnexpectedTensor(
            f"{path}: {_some(extra)} left over; the model has no place for {_them(extra)}",
            "a scale without its quantized weight, or a checkpoint of another model, looks like this.",
        )
    for name, shape in sources.items():
        if shape != places[name]:
            raise ShapeMismatch(f"{path}: {name} has shape {list(shape)}, expected {list(places[name])}")


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
    linears = plan.checkpoint.contents.linears.values()
    if plan.activations != AS_STORED and linears:
        yield "inputs stay unquantized on request; the checkpoint's input scales are not used"
    without = [linear for linear in linears if not linear.scheme.quantizes_input(linear.keys)]
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
