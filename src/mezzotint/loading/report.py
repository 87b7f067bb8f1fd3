"""What was loaded, from what, and which backends run it."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from mezzotint.costs import resident_bytes
from mezzotint.hub import AnyPath
from mezzotint.kernels import BackendUse, merge_uses
from mezzotint.kernels.verified import NOT_VERIFIED
from mezzotint.loading.events import load_events
from mezzotint.loading.plan import LoadPlan
from mezzotint.nn import QuantLinear, SplitLinear, quant_linears


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, from what, and which backends run it.

    evidence          why the format was recognized; `declined` is why each other format was not
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
        """Return the report as plain values for JSON."""
        return asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        return "\n".join(_report_lines(self))


def report(plan: LoadPlan, model: nn.Module, blank: Mapping[str, str] | None = None) -> LoadReport:
    """Return what `model`, filled by this plan, holds and runs on.

    blank   {blank layer: message}, from `replace_linears`
    """
    backends = _backend_uses(model)
    header, detected = plan.checkpoint.header, plan.checkpoint.detected
    return LoadReport(
        path=header.path,
        format=detected.format.title,
        evidence=plan.checkpoint.evidence,
        declined=detected.declined,
        tensors_used=len(header.tensors.keys() - plan.checkpoint.ignored.keys()),
        ignored=plan.checkpoint.ignored,
        resident_bytes=resident_bytes([model]),
        backends=backends,
        events=tuple(load_events(plan, model, backends, blank or {})),
    )


def _backend_uses(model: nn.Module) -> tuple[BackendUse, ...]:
    """Return the backends in `model`, merged; a layer whose pieces differ counts for each."""
    return merge_uses(use for layer in quant_linears(model).values() for use in _layer_uses(layer))


def _layer_uses(layer: QuantLinear | SplitLinear) -> Iterator[BackendUse]:
    """Yield the backends of one layer; equal pieces count as one layer."""
    uses = merge_uses(BackendUse.of(piece.scheme, piece.selection) for piece in layer.sublayers)
    return (replace(use, layers=1) for use in uses)


def _report_lines(report: LoadReport) -> Iterator[str]:
    """Yield the lines that a report prints as."""
    yield f"{report.path}: {report.format}"
    yield f"  because {report.evidence}"
    yield f"  {report.tensors_used} tensors used, {len(report.ignored)} ignored"
    sizes = report.resident_bytes.items()
    yield "  resident: " + ", ".join(f"{dtype} {size / 2**20:.1f} MiB" for dtype, size in sizes)
    for use in report.backends:
        verified = "" if use.verified else f", {NOT_VERIFIED}"
        yield f"  {use.layers} {use.scheme} layers on {use.backend}{verified}"
    for event in report.events:
        yield f"  note: {event}"
