"""Say from headers alone what a checkpoint is, how its bytes are arranged, what is missing, and who can run it here."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import CheckpointError
from mezzotint.formats import Contents, Header, StoredLinear
from mezzotint.hub import AnyPath
from mezzotint.kernels import AS_STORED, Can, Target, WeightSpec, backends
from mezzotint.layouts import plain_shape
from mezzotint.schemes import BF16, Shape


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
class Runner:
    """Whether a backend can run the layers of a scheme on `target`; `reason` is why not, or empty."""

    scheme: str
    backend: str
    target: str
    can: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """What `inspect` found.

    coverage        quantized weights / all weights, by count of numbers
    missing         one sentence for each tensor that is absent or malformed
    notes           oddities that stop nothing
    stored_bytes    of all tensors in the files
    resident_bytes  predicted for the loaded weights: quantized parts as stored, the rest in BF16
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
    resident_bytes: int
    runners: tuple[Runner, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}

    def schemes(self) -> dict[str, int]:
        """{scheme: number of layers}"""
        return dict(Counter(layer.scheme for layer in self.layers))


def inspect(path: str | AnyPath, device: str | torch.device = "cpu", base: str | AnyPath | None = None) -> Report:
    """Report on a checkpoint file or component folder, from headers and marker tensors.

    Weights are read only where nothing in the headers proves how they are arranged: a few rows of a few layers.

    base     the BF16 model to hold those against
    device   whose abilities the report speaks of
    Raises   CheckpointError where a file cannot be read, or is nothing that Mezzotint knows
    """
    checkpoint = Checkpoint.open(path, base=base)
    header, recognised, contents = checkpoint.header, checkpoint.recognised, checkpoint.contents
    target = Target.of(torch.device(device))
    return Report(
        path=header.path,
        files=tuple(file.name for file in header.files),
        format=recognised.format.title,
        evidence=checkpoint.evidence,
        declined=recognised.declined,
        family=checkpoint.family.title,
        coverage=_coverage(header, contents),
        layers=tuple(_layer(linear, header) for linear in contents.linears.values()),
        other_tensors=len(contents.plain),
        ignored=checkpoint.ignored,
        missing=tuple(_missing(header, contents)),
        notes=header.notes,
        stored_bytes=header.nbytes(),
        resident_bytes=_resident_bytes(header, contents),
        runners=tuple(_runners(header, contents, target)),
    )


def _coverage(header: Header, contents: Contents) -> float:
    linears = contents.linears.values()
    quantized = sum(math.prod(linear.shape) for linear in linears if linear.scheme is not BF16)
    plain = sum(math.prod(header.tensors[key].shape) for key in contents.plain)
    transformed = sum(math.prod(linear.shape) for linear in linears if linear.scheme is BF16)
    return quantized / max(quantized + plain + transformed, 1)


def _layer(linear: StoredLinear, header: Header) -> Layer:
    present = {part: key for part, key in linear.keys.items() if key in header.tensors}
    nbytes = sum(header.tensors[key].nbytes for key in present.values())
    return Layer(linear.module, linear.scheme.name, linear.shape, str(linear.layout), nbytes, present)


def _missing(header: Header, contents: Contents) -> list[str]:
    found = []
    for linear in contents.linears.values():
        try:
            linear.check(header)
        except CheckpointError as error:
            found.append(error.message)
    return found


def _resident_bytes(header: Header, contents: Contents) -> int:
    quantized = sum(_layer(linear, header).nbytes for linear in contents.linears.values())
    plain = sum(math.prod(header.tensors[key].shape) for key in contents.plain)
    return quantized + plain * torch.bfloat16.itemsize


def _runners(header: Header, contents: Contents, target: Target) -> list[Runner]:
    """Each backend's answer for each scheme; a reason that only some of its layers meet is given as theirs."""
    runners = []
    for scheme in sorted({linear.scheme.name for linear in contents.linears.values() if linear.scheme is not BF16}):
        linears = [linear for linear in contents.linears.values() if linear.scheme.name == scheme]
        for backend in backends().values():
            answers = [backend.can(_spec(linear, header), target, AS_STORED) for linear in linears]
            reasons = [answer.reason for answer in answers if not isinstance(answer, Can)]
            some = f" ({len(reasons)} of {len(linears)} layers)" if 0 < len(reasons) < len(linears) else ""
            runners.append(
                Runner(
                    scheme,
                    backend.name,
                    str(target),
                    len(reasons) < len(linears),
                    reasons[0] + some if reasons else "",
                )
            )
    return runners


def _spec(linear: StoredLinear, header: Header) -> WeightSpec:
    shapes: dict[str, Shape] = dict.fromkeys(linear.implied, ())
    for part, key in linear.keys.items():
        if key in header.tensors:
            stored = header.tensors[key].shape
            shapes[part] = plain_shape(linear.scheme, linear.layout, part, linear.shape, stored) or stored
    return WeightSpec(linear.scheme, linear.shape, shapes, linear.dynamic_input)
