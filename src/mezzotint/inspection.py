"""The report of `mezzotint inspect`: format, problems, and backends per device."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mezzotint import layouts
from mezzotint.formats import Contents, DetectedFormat, Header, StoredLinear
from mezzotint.formats.contents import unclaimed_parts
from mezzotint.hub import AnyPath
from mezzotint.kernels import (
    GPU_GENERATIONS,
    WITH_PYTORCH,
    BackendUse,
    Target,
    WeightSpec,
    best_device,
    merge_uses,
    select,
)
from mezzotint.schemes import BF16
from mezzotint.tensor import QuantTensor


@dataclass(frozen=True)
class LayerSummary:
    """One quantized linear.

    shape     logical shape (out, in)
    nbytes    bytes of all its parts
    tensors   {part: tensor name}
    """

    module: str
    scheme: str
    shape: tuple[int, int]
    layout: str
    nbytes: int
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class DeviceEstimate:
    """How a checkpoint would run on one kind of device.

    For other machines, libraries that come with PyTorch there, such as Triton, count as installed.
    Other libraries count only if they are installed on this machine.

    device           name of the kind, such as "H100"
    target           its architecture, such as "sm_90"
    is_this_machine  this machine has such a device
    resident_bytes   predicted: quantized layers in their backends' layout, other tensors in BF16;
                     float32 tensors and prepared tensors add a few percent
    backends         backends of the quantized layers, and why the others cannot run them
    """

    device: str
    target: str
    is_this_machine: bool
    resident_bytes: int
    backends: tuple[BackendUse, ...]


@dataclass(frozen=True)
class InspectReport:
    """What `inspect` found.

    coverage      quantized weights / all weights, by count of elements
    problems      one sentence for each tensor that is absent or malformed
    notes         oddities that do not stop a load
    stored_bytes  bytes of all tensors in the files
    devices       estimates for the CPU, each GPU generation, and this machine
    unplaced      stored tensors that the model does not have
    """

    path: AnyPath
    files: tuple[str, ...]
    format: str
    evidence: str
    declined: Mapping[str, str]
    family: str
    coverage: float
    layers: tuple[LayerSummary, ...]
    other_tensors: int
    ignored: Mapping[str, str]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    stored_bytes: int
    devices: tuple[DeviceEstimate, ...]
    unplaced: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}

    def schemes(self) -> dict[str, int]:
        """Return {scheme: number of layers}."""
        return dict(Counter(layer.scheme for layer in self.layers))


def build_report(
    header: Header,
    detected: DetectedFormat,
    contents: Contents,
    evidence: str,
    family: str,
    ignored: Mapping[str, str],
) -> InspectReport:
    """Report on a checkpoint whose format and layout are detected."""
    faults = {
        module: fault
        for module, linear in contents.linears.items()
        if (fault := linear.problem(header))
    }
    sound = [linear for module, linear in contents.linears.items() if module not in faults]
    return InspectReport(
        path=header.path,
        files=tuple(file.name for file in header.files),
        format=detected.format.title,
        evidence=evidence,
        declined=detected.declined,
        family=family,
        coverage=_coverage(header, contents),
        layers=tuple(_layer(linear, header) for linear in contents.linears.values()),
        other_tensors=len(contents.plain),
        ignored=ignored,
        problems=(*faults.values(), *unclaimed_parts(header, contents).values()),
        notes=(*header.notes, *dict.fromkeys(contents.problems.values())),
        stored_bytes=header.nbytes(),
        devices=tuple(_device_estimates(header, sound, contents.plain)),
    )


def _coverage(header: Header, contents: Contents) -> float:
    linears = contents.linears.values()
    quantized = sum(math.prod(linear.shape) for linear in linears if linear.scheme is not BF16)
    plain = sum(math.prod(header.tensors[key].shape) for key in contents.plain)
    transformed = sum(math.prod(linear.shape) for linear in linears if linear.scheme is BF16)
    return quantized / max(quantized + plain + transformed, 1)


def _layer(linear: StoredLinear, header: Header) -> LayerSummary:
    present = {part: key for part, key in linear.keys.items() if key in header.tensors}
    return LayerSummary(
        linear.module,
        linear.scheme.name,
        linear.shape,
        str(linear.layout),
        linear.nbytes(header),
        present,
    )


def _device_estimates(
    header: Header, linears: list[StoredLinear], plain: tuple[str, ...]
) -> Iterator[DeviceEstimate]:
    """Yield an estimate for each kind of device, from the complete linears and plain tensors."""
    kinds = _distinct_layers(header, [linear for linear in linears if linear.scheme is not BF16])
    numbers = sum(math.prod(header.tensors[key].shape) for key in plain)
    numbers += sum(math.prod(linear.shape) for linear in linears if linear.scheme is BF16)
    numbers += sum(linear.shape[0] for linear in linears if "bias" in linear.keys)
    here = Target.of(best_device())
    known = {"CPU": Target("cpu"), **GPU_GENERATIONS}
    devices = known if here in known.values() else {"this device": here, **known}
    for device, target in devices.items():
        yield _device_estimate(
            device, target, target == here, kinds, numbers * torch.bfloat16.itemsize
        )


def _device_estimate(
    device: str, target: Target, here: bool, kinds: list[tuple[QuantTensor, int]], rest: int
) -> DeviceEstimate:
    uses, resident = [], rest
    for weight, layers in kinds:
        chosen = select(WeightSpec.of(weight), target, presumed=() if here else WITH_PYTORCH)
        uses.append(BackendUse.of(weight.scheme, chosen, layers))
        resident += layers * layouts.convert(weight, chosen.backend.weight_layout).nbytes()
    return DeviceEstimate(device, str(target), here, resident, merge_uses(uses))


def _distinct_layers(header: Header, linears: list[StoredLinear]) -> list[tuple[QuantTensor, int]]:
    """Return (outline of a layer, number of equal layers): most layers of a model are equal."""
    alike: dict[object, list[StoredLinear]] = {}
    for linear in linears:
        parts = tuple(
            (part, header.tensors[key].shape, header.tensors[key].dtype)
            for part, key in linear.keys.items()
        )
        implied, finished = tuple(linear.implied_values.items()), linear.postprocess is not None
        form = (
            type(linear),
            linear.scheme.name,
            linear.layout,
            linear.dynamic_input,
            implied,
            finished,
        )
        kind = (*form, linear.shape, parts)
        alike.setdefault(kind, []).append(linear)
    return [(_outline(same[0], header), len(same)) for same in alike.values()]


def _outline(linear: StoredLinear, header: Header) -> QuantTensor:
    plain = linear.to_plain(linear.outline(header))
    return replace(
        plain, parts={name: part for name, part in plain.parts.items() if name != "bias"}
    )
