"""What `mezzotint inspect` prints: what a checkpoint is, what is wrong with it, who can run it where."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mezzotint import layouts
from mezzotint.formats import Contents, Header, Recognised, StoredLinear
from mezzotint.formats.contents import orphans
from mezzotint.hub import AnyPath
from mezzotint.kernels import (
    GENERATIONS,
    WITH_PYTORCH,
    BackendUse,
    Target,
    WeightSpec,
    best_device,
    count_uses,
    select,
)
from mezzotint.schemes import BF16
from mezzotint.tensor import QuantTensor


@dataclass(frozen=True)
class Layer:
    """One quantized linear: logical shape (out, in), bytes of all its parts, and their tensor names by part."""

    module: str
    scheme: str
    shape: tuple[int, int]
    layout: str
    nbytes: int
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Outlook:
    """What a checkpoint would be once it is loaded on one kind of device.

    It is about the device: on another machine's, what comes with PyTorch there counts as installed (Triton). Libraries
    that one installs count where they are installed here; the backends that lack one are named with it.

    device          what the kind is known by, such as "H100"
    target          "sm_90"
    here            this machine has one
    resident_bytes  predicted: quantized layers in the layout of their backends, everything else in BF16; what a model
                    keeps in float32, what the split of a joined layer repeats and what a backend prepares comes on
                    top (some per cent)
    backends        who would run the quantized layers, and why each other backend of their scheme would not
    """

    device: str
    target: str
    here: bool
    resident_bytes: int
    backends: tuple[BackendUse, ...]


@dataclass(frozen=True)
class Report:
    """What `inspect` found.

    coverage      quantized weights / all weights, by count of numbers
    missing       one sentence for each tensor that is absent or malformed
    notes         oddities that stop nothing
    stored_bytes  of all tensors in the files
    outlooks      for the CPU, for each generation of GPUs, and for what is here
    unplaced      stored tensors that the model has no place for
    """

    path: AnyPath
    files: tuple[str, ...]
    format: str
    evidence: str
    declined: Mapping[str, str]
    family: str
    coverage: float
    layers: tuple[Layer, ...]
    other_tensors: int
    ignored: Mapping[str, str]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    stored_bytes: int
    outlooks: tuple[Outlook, ...]
    unplaced: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}

    def schemes(self) -> dict[str, int]:
        """{scheme: number of layers}"""
        return dict(Counter(layer.scheme for layer in self.layers))


def report_on(
    header: Header, recognised: Recognised, contents: Contents, evidence: str, family: str, ignored: Mapping[str, str]
) -> Report:
    """The report on a recognised checkpoint: its layout settled on `evidence`, its tensors those of `family`."""
    faults = {module: fault for module, linear in contents.linears.items() if (fault := linear.fault(header))}
    sound = [linear for module, linear in contents.linears.items() if module not in faults]
    return Report(
        path=header.path,
        files=tuple(file.name for file in header.files),
        format=recognised.format.title,
        evidence=evidence,
        declined=recognised.declined,
        family=family,
        coverage=_coverage(header, contents),
        layers=tuple(_layer(linear, header) for linear in contents.linears.values()),
        other_tensors=len(contents.plain),
        ignored=ignored,
        missing=(*faults.values(), *orphans(header, contents).values()),
        notes=(*header.notes, *dict.fromkeys(contents.faults.values())),
        stored_bytes=header.nbytes(),
        outlooks=tuple(_outlooks(header, sound, contents.plain)),
    )


def _coverage(header: Header, contents: Contents) -> float:
    linears = contents.linears.values()
    quantized = sum(math.prod(linear.shape) for linear in linears if linear.scheme is not BF16)
    plain = sum(math.prod(header.tensors[key].shape) for key in contents.plain)
    transformed = sum(math.prod(linear.shape) for linear in linears if linear.scheme is BF16)
    return quantized / max(quantized + plain + transformed, 1)


def _layer(linear: StoredLinear, header: Header) -> Layer:
    present = {part: key for part, key in linear.keys.items() if key in header.tensors}
    return Layer(linear.module, linear.scheme.name, linear.shape, str(linear.layout), linear.nbytes(header), present)


def _outlooks(header: Header, linears: list[StoredLinear], plain: tuple[str, ...]) -> Iterator[Outlook]:
    """What the sound linears and the plain tensors would be on each kind of device."""
    kinds = _kinds(header, [linear for linear in linears if linear.scheme is not BF16])
    numbers = sum(math.prod(header.tensors[key].shape) for key in plain)
    numbers += sum(math.prod(linear.shape) for linear in linears if linear.scheme is BF16)
    numbers += sum(linear.shape[0] for linear in linears if "bias" in linear.keys)
    here = Target.of(best_device())
    known = {"CPU": Target("cpu"), **GENERATIONS}
    devices = known if here in known.values() else {"this device": here, **known}
    for device, target in devices.items():
        yield _outlook(device, target, target == here, kinds, numbers * torch.bfloat16.itemsize)


def _outlook(device: str, target: Target, here: bool, kinds: list[tuple[QuantTensor, int]], rest: int) -> Outlook:
    uses, resident = [], rest
    for weight, layers in kinds:
        chosen = select(WeightSpec.of(weight), target, presumed=() if here else WITH_PYTORCH)
        uses.append(BackendUse.of(weight.scheme, chosen, layers))
        resident += layers * layouts.convert(weight, chosen.backend.wants).nbytes()
    return Outlook(device, str(target), here, resident, count_uses(uses))


def _kinds(header: Header, linears: list[StoredLinear]) -> list[tuple[QuantTensor, int]]:
    """Outlines of layers, plain and without bias, and how many are alike: a model has few kinds of layer, often."""
    alike: dict[object, list[StoredLinear]] = {}
    for linear in linears:
        parts = tuple((part, header.tensors[key].shape, header.tensors[key].dtype) for part, key in linear.keys.items())
        implied, finished = tuple(linear.implied.items()), linear.finish is not None
        form = (type(linear), linear.scheme.name, linear.layout, linear.dynamic_input, implied, finished)
        kind = (*form, linear.shape, parts)
        alike.setdefault(kind, []).append(linear)
    return [(_outline(same[0], header), len(same)) for same in alike.values()]


def _outline(linear: StoredLinear, header: Header) -> QuantTensor:
    plain = linear.plain(linear.outline(header))
    return replace(plain, parts={name: part for name, part in plain.parts.items() if name != "bias"})
