"""What a format finds in a header: the quantized linears, the tensors stored as they are, and what it ignores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mezzotint.errors import MissingTensor, ShapeMismatch
from mezzotint.formats.header import Header
from mezzotint.layouts import convert, plain_dtype, plain_shape, stored_shapes
from mezzotint.schemes import Scheme
from mezzotint.tensor import PLAIN, Layout, QuantTensor


@dataclass(frozen=True)
class Match:
    """The format recognises the file, and why."""

    evidence: str


@dataclass(frozen=True)
class NoMatch:
    """The format does not recognise the file, and why."""

    reason: str


@dataclass(frozen=True)
class StoredLinear:
    """A quantized linear as a file holds it.

    module   the layer's name as the file spells it
    shape    logical (out, in)
    keys     {part: tensor name}, for the parts that are there and for those that ought to be
    implied  {part: value} of single numbers that the format knows and the file does not spell out
    finish   what is left to undo once the bytes are plain, such as rows that a fused kernel wants interleaved
    """

    module: str
    scheme: Scheme
    layout: Layout
    shape: tuple[int, int]
    keys: Mapping[str, str]
    implied: Mapping[str, float] = field(default_factory=dict)
    finish: Callable[[QuantTensor], QuantTensor] | None = None

    def check(self, header: Header) -> None:
        """Raise MissingTensor or ShapeMismatch, naming the tensor and the file."""
        for part, key in self.keys.items():
            if key not in header.tensors:
                raise _missing(self, part, key, header)
            info = header.tensors[key]
            where = f"{info.file.name}: {key}"
            shape = plain_shape(self.scheme, self.layout, part, self.shape, info.shape)
            if shape is None:
                raise self._misarranged(part, info.shape, where)
            self.scheme.check_part(part, shape, plain_dtype(self.layout, part, info.dtype), self.shape, where)

    def nbytes(self, header: Header) -> int:
        return sum(header.tensors[key].nbytes for key in self.keys.values())

    def read(self, header: Header) -> QuantTensor:
        """The weight's values, in the file's own layout; raises BadScale where a scale is not a usable number."""
        parts = {}
        for part, key in self.keys.items():
            parts[part] = header.tensors[key].read()
            self.scheme.check_values(part, parts[part], f"{header.tensors[key].file}: {key}")
        parts |= {part: torch.tensor(value) for part, value in self.implied.items()}
        return QuantTensor(self.scheme, self.layout, self.shape, parts)

    def read_plain(self, header: Header) -> QuantTensor:
        """The weight's values in the plain layout, with all that the format does to them undone.

        Raises   what `check` and `read` raise
        """
        self.check(header)
        plain = convert(self.read(header), PLAIN)
        return plain if self.finish is None else self.finish(plain)

    def _misarranged(self, part: str, have: tuple[int, ...], where: str) -> ShapeMismatch:
        allowed = stored_shapes(self.scheme, self.layout, part, self.shape, have)
        return ShapeMismatch(
            f"{where} has shape {list(have)}, expected {' or '.join(str(list(shape)) for shape in allowed)} "
            f"({self.scheme.part(part).meaning}, {self.scheme.title} of {self.shape[0]} x {self.shape[1]})",
            "run `mezzotint inspect PATH` to see how the file is laid out.",
        )


def _missing(linear: StoredLinear, part: str, key: str, header: Header) -> MissingTensor:
    present = next(header.tensors[k] for k in linear.keys.values() if k in header.tensors)
    message = f"{present.file}: {key} is not there; {linear.scheme.title} needs it ({linear.scheme.part(part).meaning})"
    hint = "a missing scale is never taken to be 1.0. Export or download the file again."
    if part == linear.scheme.static_input:
        hint = 'to run without it, leave the inputs unquantized: activations="bf16" (--activations bf16).'
    return MissingTensor(message, hint)


@dataclass(frozen=True)
class Contents:
    """Every tensor of a header, each in exactly one of the three maps.

    linears   {module: StoredLinear}
    plain     keys stored as they are
    ignored   {key: reason}
    """

    linears: Mapping[str, StoredLinear]
    plain: tuple[str, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)


class Format(Protocol):
    """One on-disk format. `detect` looks at the header alone; `contents` may raise CheckpointError."""

    name: str
    title: str

    def detect(self, header: Header) -> Match | NoMatch: ...

    def contents(self, header: Header) -> Contents: ...


def sort_out(header: Header, linears: Mapping[str, StoredLinear], ignored: Mapping[str, str]) -> Contents:
    """Contents in which every tensor that is neither part of a linear nor ignored is stored as it is."""
    claimed = {key for linear in linears.values() for key in linear.keys.values()} | ignored.keys()
    return Contents(linears, tuple(key for key in header.tensors if key not in claimed), ignored)
