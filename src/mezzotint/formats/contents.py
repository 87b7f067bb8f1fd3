"""What a format finds in a header: the quantized linears, the tensors stored as they are, and what it ignores."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from mezzotint.errors import BadScale, CheckpointError, MissingTensor, ShapeMismatch, UnexpectedTensor
from mezzotint.formats.header import Header
from mezzotint.layouts import convert, plain_dtype, plain_shape, stored_shapes
from mezzotint.layouts.tiles import TILE_ROWS
from mezzotint.schemes import Scheme, Shape
from mezzotint.schemes.scheme import F32, FLOATS, HALVES, Part
from mezzotint.tensor import PLAIN, Layout, QuantTensor

MAX_PADDING = 32
"""Rows and columns of codes are padded to multiples of 16 or 32."""


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

    module          the layer's name as the file spells it
    shape           logical (out, in)
    keys            {part: tensor name}, for the parts that are there and for those that ought to be
    implied         {part: value} of single numbers that the format knows and the file does not spell out
    finish          what is left to undo once the bytes are plain, such as rows that a fused kernel wants interleaved
    dynamic_input   the layer's input is rounded with a scale computed at each call, where the file has no static one
    """

    module: str
    scheme: Scheme
    layout: Layout
    shape: tuple[int, int]
    keys: Mapping[str, str]
    implied: Mapping[str, float] = field(default_factory=dict)
    finish: Callable[[QuantTensor], QuantTensor] | None = None
    dynamic_input: bool = False

    @property
    def quantizes_input(self) -> bool:
        """Whether the layer's input is rounded for the product, by a static scale or a dynamic one."""
        return self.scheme.quantizes_input(self.keys, self.dynamic_input)

    def keeps(self, part: str) -> bool:
        """Whether `read` gives a part as the file has it."""
        return True

    def may_be_padded_from(self, shape: Shape) -> bool:
        """Whether `shape` is smaller by what files made for one kind of kernel add to it; `check` tells for certain."""
        padding = [own - wanted for own, wanted in zip(self.shape, shape, strict=False)]
        tiled = self.layout.scales == "tiles_128x4" and len(shape) == len(self.shape)
        return tiled and any(padding) and all(0 <= more < MAX_PADDING for more in padding)

    def check(self, header: Header) -> None:
        """Raise MissingTensor or ShapeMismatch, naming the tensor and the file."""
        shapes: dict[str, Shape] = {}
        for part, key in self.keys.items():
            if key not in header.tensors:
                raise _missing(self, part, key, header)
            info = header.tensors[key]
            where = f"{info.file.name}: {key}"
            if part == "codes" and len(info.shape) != 2:
                raise ShapeMismatch(f"{where} has shape {list(info.shape)}, expected a matrix ({self.scheme.title})")
            shape = plain_shape(self.scheme, self.layout, part, self.shape, info.shape)
            if shape is None:
                raise self._misarranged(part, info.shape, where)
            dtype = _read_dtype(plain_dtype(self.layout, part, info.dtype), self.scheme.part(part))
            self.scheme.check_part(part, shape, dtype, self.shape, where)
            shapes[part] = shape
        if "shift" in {*self.keys, *self.implied} and "bias" not in self.keys:  # which makes up for it
            raise _missing(self, "bias", f"{self.module}.bias", header)
        self._check_ranks(header, shapes)

    def _check_ranks(self, header: Header, shapes: Mapping[str, Shape]) -> None:
        """Both halves of a low-rank branch have one rank."""
        for down, up in (("lora_down", "lora_up"), ("proj_down", "proj_up")):
            if down in shapes and up in shapes and shapes[down][0] != shapes[up][1]:
                info = header.tensors[self.keys[down]]
                raise ShapeMismatch(
                    f"{info.file.name}: {info.name} has rank {shapes[down][0]}, expected {shapes[up][1]} as in "
                    f"{self.keys[up]}",
                    "one of the two is from another export; download the file again.",
                )

    def fault(self, header: Header) -> str:
        """What is absent or malformed of the parts, or an empty string."""
        try:
            self.check(header)
        except CheckpointError as error:
            return error.message
        return ""

    def is_sound(self, header: Header) -> bool:
        """Whether all parts are there and have their shapes and dtypes."""
        return not self.fault(header)

    def scale_fault(self, header: Header) -> str:
        """What is wrong with the values of a sound layer's scales, or an empty string; reads them."""
        try:
            for part in self.keys:
                if self.scheme.part(part).scale:
                    self._read_part(header, part)
        except BadScale as error:
            return error.message
        return ""

    def nbytes(self, header: Header) -> int:
        """Bytes of the parts that are there."""
        return sum(header.tensors[key].nbytes for key in self.keys.values() if key in header.tensors)

    def outline(self, header: Header, values_of: Collection[str] = ()) -> QuantTensor:
        """What `read` gives, with parts on the meta device, dtypes and shapes without values, but for `values_of`."""
        parts = {
            part: self._read_part(header, part)
            if part in values_of
            else _typed(header.tensors[key].outline(), self.scheme.part(part))
            for part, key in self.keys.items()
        }
        parts |= {
            part: torch.tensor(value, device=None if part in values_of else "meta")
            for part, value in self.implied.items()
        }
        return QuantTensor(self.scheme, self.layout, self.shape, parts, self.dynamic_input)

    def read(self, header: Header) -> QuantTensor:
        """The weight's values, in the file's own layout; raises BadScale where a scale is not a usable number."""
        parts = {part: self._read_part(header, part) for part in self.keys}
        parts |= {part: torch.tensor(value) for part, value in self.implied.items()}
        return QuantTensor(self.scheme, self.layout, self.shape, parts, self.dynamic_input)

    def _read_part(self, header: Header, part: str) -> Tensor:
        info = header.tensors[self.keys[part]]
        values = _typed(info.read(), self.scheme.part(part))
        self.scheme.check_values(part, values, f"{info.file}: {info.name}")
        return values

    def read_rows(self, header: Header, first: int, last: int) -> QuantTensor:
        """The weight of output features [first, last), plain; nothing is read beyond the scale tiles they are in."""
        start, stop = first // TILE_ROWS * TILE_ROWS, -(-last // TILE_ROWS) * TILE_ROWS
        infos = dict(header.tensors)
        for part, key in self.keys.items():
            info = header.tensors[key]
            if self.scheme.part(part).rows and info.shape and info.shape[0] >= self.shape[0]:
                infos[key] = info.rows(start, min(stop, info.shape[0]))
        shape = (min(stop, self.shape[0]) - start, self.shape[1])
        read = replace(self, shape=shape).read(replace(header, tensors=infos))
        return convert(read, PLAIN).rows(torch.arange(first - start, last - start))

    def plain(self, stored: QuantTensor) -> QuantTensor:
        """What `read` or `outline` gave, in the plain layout, with all that the format does to it undone."""
        plain = convert(stored, PLAIN)
        return plain if self.finish is None else self.finish(plain)

    def _misarranged(self, part: str, have: tuple[int, ...], where: str) -> ShapeMismatch:
        allowed = stored_shapes(self.scheme, self.layout, part, self.shape, have)
        return ShapeMismatch(
            f"{where} has shape {list(have)}, expected {' or '.join(str(list(shape)) for shape in allowed)} "
            f"({self.scheme.part(part).meaning}, {self.scheme.title} of {self.shape[0]} x {self.shape[1]})",
            "run `mezzotint inspect PATH` to see how the file is laid out.",
        )


def _typed(stored: Tensor, part: Part) -> Tensor:
    """A part that is stored as raw bytes, in the one-byte dtype that its scheme names; scales of 16 bits in float32."""
    if stored.dtype is torch.uint8 and part.dtypes[0].itemsize == 1:
        return stored.view(part.dtypes[0])
    return stored.to(_read_dtype(stored.dtype, part))


def _read_dtype(stored: torch.dtype, part: Part) -> torch.dtype:
    """The dtype in which a part is read: float32 where a scheme wants that, which holds all numbers of 16 bits."""
    return torch.float32 if part.dtypes == F32 and stored in HALVES else stored


def _missing(linear: StoredLinear, part: str, key: str, header: Header) -> MissingTensor:
    present = next(header.tensors[k] for k in linear.keys.values() if k in header.tensors)
    message = f"{present.file}: {key} is not there; {linear.scheme.title} needs it ({linear.scheme.part(part).meaning})"
    hint = "export or download the file again."
    if linear.scheme.part(part).scale:
        hint = f"a missing scale is never taken to be 1.0; {hint}"
    if part == linear.scheme.static_input:
        hint = 'to run without it, leave the inputs unquantized: activations="bf16" (--activations bf16).'
    return MissingTensor(message, hint)


@dataclass(frozen=True)
class Contents:
    """Every tensor of a header, each in exactly one of the three maps.

    linears    {module: StoredLinear}
    plain      keys stored as they are
    ignored    {key: reason}
    evidence   one sentence for each thing that the format concluded about the layout, and how
    assumed    fields of Layout that nothing in the header proves
    joined     {module: the linears that lie side by side along its input features}, where it is not one alone
    faults     {module: what is wrong with its scales} of layers that were to tell the layout, and could not for that
    unscaled   numbers in e4m3 stand for themselves: the file is a cast, and has no scales
    """

    linears: Mapping[str, StoredLinear]
    plain: tuple[str, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()
    assumed: frozenset[str] = frozenset()
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    unscaled: bool = False


class Format(Protocol):
    """One on-disk format. `detect` looks at the header alone; `contents` may raise CheckpointError."""

    name: str
    title: str

    def detect(self, header: Header) -> Match | NoMatch: ...

    def contents(self, header: Header) -> Contents: ...


PARTS = (
    *(".weight_scale", ".weight_scale_2", ".input_scale", ".scale_weight", ".scale_input", ".pre_quant_scale"),
    *(".svdquant_lora_a", ".svdquant_lora_b", ".qweight", ".wscales", ".wzeros", ".wcscales", ".wtscale"),
    *(".smooth", ".smooth_factor", ".lora_down", ".lora_up", ".proj_down", ".proj_up"),
)
"""How names end that only parts of quantized layers have, in any format."""


def orphans(header: Header, contents: Contents) -> dict[str, str]:
    """{part of a quantized layer that no quantized layer has claimed: what is wrong with it}"""
    return {key: _orphaned(header, contents, key) for key in contents.plain if key.endswith(PARTS)}


def _orphaned(header: Header, contents: Contents, key: str) -> str:
    module = key.rpartition(".")[0]
    where, weight = f"{header.tensors[key].file.name}: {key}", header.tensors.get(f"{module}.weight")
    if module in contents.linears:
        return f"{where} is no part of a layer of {contents.linears[module].scheme.title}"
    beside = "no weight is beside it" if weight is None else f"the weight beside it is {weight.dtype}"
    return f"{where} belongs to no quantized layer; {beside}"


DUMMY = "a scale of 1.0 beside a weight that is not quantized"
DUMMIES = (".scale_weight", ".scale_input", ".weight_scale", ".input_scale")


def _is_dummy(header: Header, key: str) -> bool:
    """Whether a tensor is a scale of nothing but ones beside an unquantized weight; reads its few numbers."""
    info, weight = header.tensors[key], header.tensors.get(f"{key.rpartition('.')[0]}.weight")
    if not key.endswith(DUMMIES) or weight is None or weight.dtype not in FLOATS or info.dtype not in FLOATS:
        return False
    numbers = math.prod(info.shape)
    return numbers in (1, *weight.shape[:1]) and bool((info.read() == 1).all())


def sort_out(
    header: Header,
    linears: Mapping[str, StoredLinear],
    ignored: Mapping[str, str],
    joined: Mapping[str, tuple[str, ...]] | None = None,
) -> Contents:
    """Contents in which every tensor that is neither part of a linear nor ignored is stored as it is.

    Scales of exactly 1.0 beside a weight that is not quantized are ignored: they are what converters put there.

    Raises  UnexpectedTensor where an unquantized weight stands beside the quantized one of the same layer
    """
    claimed = {key for linear in linears.values() for key in linear.keys.values()} | ignored.keys()
    dummies = [key for key in header.tensors if key not in claimed and _is_dummy(header, key)]
    ignored = {**ignored, **dict.fromkeys(dummies, DUMMY)}
    claimed |= ignored.keys()
    plain = tuple(key for key in header.tensors if key not in claimed)
    for key in plain:
        if key.removesuffix(".weight") in linears:
            raise UnexpectedTensor(f"{header.path}: {key} is left over: the layer is quantized, and has other tensors")
    return Contents(linears, plain, ignored, joined=joined or {})
