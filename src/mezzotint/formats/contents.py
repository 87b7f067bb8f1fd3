"""What a format finds in a header: quantized linears, plain tensors, and ignored tensors."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from mezzotint.errors import (
    BadScale,
    CheckpointError,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
)
from mezzotint.formats.header import Header
from mezzotint.layouts import convert, plain_dtype, plain_shape, stored_shapes
from mezzotint.layouts.tiles import TILE_ROWS
from mezzotint.schemes import Scheme, Shape
from mezzotint.schemes.scheme import FLOAT32, FLOAT_DTYPES, HALF_DTYPES, Part
from mezzotint.tensor import PLAIN, Layout, QuantTensor

MAX_PADDING = 32
"""Rows and columns of codes are padded to multiples of 16 or 32."""


@dataclass(frozen=True)
class Match:
    """The format recognizes the file; `evidence` says why.

    certain   only this format's files have what was found, whatever other formats recognize
    """

    evidence: str
    certain: bool = False


@dataclass(frozen=True)
class NoMatch:
    """The format does not recognize the file; `reason` says why."""

    reason: str


@dataclass(frozen=True)
class StoredLinear:
    """A quantized linear as a file stores it.

    module          the layer's name in the file
    shape           logical (out, in)
    keys            {part: tensor name}, of present parts and of required parts that are absent
    implied_values  {part: value} that the format defines and the file does not store as a tensor
    postprocess     the last step to plain values, such as undoing interleaved rows
    dynamic_input   without a static scale in the file, quantize the input with a scale per call
    """

    module: str
    scheme: Scheme
    layout: Layout
    shape: tuple[int, int]
    keys: Mapping[str, str]
    implied_values: Mapping[str, float | Tensor] = field(default_factory=dict)
    postprocess: Callable[[QuantTensor], QuantTensor] | None = None
    dynamic_input: bool = False

    @property
    def quantizes_activation(self) -> bool:
        """Whether the layer quantizes its input before the GEMM."""
        return self.scheme.quantizes_activation(self.keys, self.dynamic_input)

    def part(self, name: str) -> Part:
        """Return the description of a key of `keys`."""
        return self.scheme.part(name)

    def name_of(self, part: str) -> str:
        """Return the name of a part's tensor, for messages."""
        return self.keys.get(part, f"{self.module}.{part}")

    def is_read_unchanged(self, part: str) -> bool:
        """Return whether `read` returns a part with the bytes of the file."""
        return True

    def may_be_padded_from(self, shape: Shape) -> bool:
        """Return whether padding alone could turn `shape` into this shape; `check` proves it."""
        padding = [stored - true for stored, true in zip(self.shape, shape, strict=False)]
        tiled = self.layout.scales == "tiles_128x4" and len(shape) == len(self.shape)
        return tiled and any(padding) and all(0 <= more < MAX_PADDING for more in padding)

    def check(self, header: Header) -> None:
        """Raise MissingTensor or ShapeMismatch, naming the tensor and the file."""
        shapes: dict[str, Shape] = {}
        for part, key in self.keys.items():
            if key not in header.tensors:
                raise missing_part(self, part, key, header)
            info = header.tensors[key]
            where = f"{info.file.name}: {key}"
            stored = info.storage_shape
            if part == "codes" and len(stored) != 2:
                raise ShapeMismatch(
                    f"{where} has shape {list(stored)}, expected a matrix ({self.scheme.title})"
                )
            shape = plain_shape(self.scheme, self.layout, part, self.shape, stored)
            if shape is None:
                raise self._shape_mismatch(part, stored, where)
            dtype = plain_dtype(self.layout, part, info.storage_dtype)
            dtype = _read_dtype(dtype, self.scheme.part(part))
            self.scheme.check_part(part, shape, dtype, self.shape, where)
            shapes[part] = shape
        # The shift changes every output by a constant, and only a bias can undo that.
        if "shift" in {*self.keys, *self.implied_values} and "bias" not in self.keys:
            raise missing_part(self, "bias", f"{self.module}.bias", header)
        self._check_ranks(header, shapes)

    def _check_ranks(self, header: Header, shapes: Mapping[str, Shape]) -> None:
        """Raise ShapeMismatch unless both halves of a low-rank branch have one rank."""
        for down, up in (("lora_down", "lora_up"), ("proj_down", "proj_up")):
            if down in shapes and up in shapes and shapes[down][0] != shapes[up][1]:
                info = header.tensors[self.keys[down]]
                raise ShapeMismatch(
                    f"{info.file.name}: {info.name} has rank {shapes[down][0]}, "
                    f"expected {shapes[up][1]} as in {self.keys[up]}",
                    "one of the two is from another export; download the file again.",
                )

    def problem(self, header: Header) -> str:
        """Return what is absent or malformed, or an empty string."""
        try:
            self.check(header)
        except CheckpointError as error:
            return error.message
        return ""

    def is_complete(self, header: Header) -> bool:
        """Return whether all parts are present, with the right shapes and dtypes."""
        return not self.problem(header)

    def scale_problem(self, header: Header) -> str:
        """Read the scales of a complete layer; return the problem with them, or an empty string."""
        try:
            for part in self.keys:
                if self.part(part).scale:
                    self._read_part(header, part)
        except BadScale as error:
            return error.message
        return ""

    def nbytes(self, header: Header) -> int:
        """Return the bytes of all parts that are present."""
        return sum(
            header.tensors[key].nbytes for key in self.keys.values() if key in header.tensors
        )

    def outline(self, header: Header, read_parts: Collection[str] = ()) -> QuantTensor:
        """Return what `read` returns, on the meta device except for the values of `read_parts`."""
        parts = {
            part: self._read_part(header, part)
            if part in read_parts
            else _typed(header.tensors[key].to_meta(), self.scheme.part(part))
            for part, key in self.keys.items()
        }
        parts |= {
            part: torch.as_tensor(value, device=None if part in read_parts else "meta")
            for part, value in self.implied_values.items()
        }
        return QuantTensor(self.scheme, self.layout, self.shape, parts, self.dynamic_input)

    def read(self, header: Header) -> QuantTensor:
        """Return the weight in the file's layout. Raises BadScale if a scale is not usable."""
        parts = {part: self._read_part(header, part) for part in self.keys}
        # Each layer gets a copy: buffers that share memory cannot be saved.
        parts |= {p: torch.as_tensor(value).clone() for p, value in self.implied_values.items()}
        return QuantTensor(self.scheme, self.layout, self.shape, parts, self.dynamic_input)

    def _read_part(self, header: Header, part: str) -> Tensor:
        info = header.tensors[self.keys[part]]
        values = _typed(info.read(), self.scheme.part(part))
        self.scheme.check_values(part, values, f"{info.file}: {info.name}")
        return values

    def read_rows(self, header: Header, first: int, last: int) -> QuantTensor:
        """Return output features [first, last), plain, reading only the scale tiles they are in."""
        # Block scales may be in tiles of 128 rows, so the rows that are read are whole tiles.
        start, stop = first // TILE_ROWS * TILE_ROWS, -(-last // TILE_ROWS) * TILE_ROWS
        infos = dict(header.tensors)
        for part, key in self.keys.items():
            info = header.tensors[key]
            if self.scheme.part(part).rows and info.shape and info.shape[0] >= self.shape[0]:
                infos[key] = info.slice_rows(start, min(stop, info.shape[0]))
        shape = (min(stop, self.shape[0]) - start, self.shape[1])
        read = replace(self, shape=shape).read(replace(header, tensors=infos))
        return convert(read, PLAIN).select_rows(torch.arange(first - start, last - start))

    def to_plain(self, stored: QuantTensor) -> QuantTensor:
        """Convert what `read` or `outline` returned to the plain layout, and postprocess it."""
        plain = convert(stored, PLAIN)
        return plain if self.postprocess is None else self.postprocess(plain)

    def _shape_mismatch(self, part: str, have: tuple[int, ...], where: str) -> ShapeMismatch:
        allowed = stored_shapes(self.scheme, self.layout, part, self.shape, have)
        return ShapeMismatch(
            f"{where} has shape {list(have)}, "
            f"expected {' or '.join(str(list(shape)) for shape in allowed)} "
            f"({self.scheme.part(part).meaning}, {self.scheme.title} of "
            f"{self.shape[0]} x {self.shape[1]})",
            "run `mezzotint inspect PATH` to see how the file is laid out.",
        )


def _typed(stored: Tensor, part: Part) -> Tensor:
    """View raw bytes in the one-byte dtype of the scheme; convert 16-bit scales to float32."""
    if stored.dtype is torch.uint8 and part.dtypes[0].itemsize == 1:
        return stored.view(part.dtypes[0])
    return stored.to(_read_dtype(stored.dtype, part))


def _read_dtype(stored: torch.dtype, part: Part) -> torch.dtype:
    """Return the dtype of a part after reading; float32 holds all 16-bit numbers exactly."""
    return torch.float32 if part.dtypes == FLOAT32 and stored in HALF_DTYPES else stored


def missing_part(linear: StoredLinear, part: str, key: str, header: Header) -> MissingTensor:
    present = next(header.tensors[k] for k in linear.keys.values() if k in header.tensors)
    message = (
        f"{present.file}: {key} is not there; {linear.scheme.title} needs it "
        f"({linear.part(part).meaning})"
    )
    hint = "export or download the file again."
    if linear.part(part).scale:
        hint = f"a missing scale is never taken to be 1.0; {hint}"
    if part == linear.scheme.static_scale_part:
        hint = (
            "to run without it, leave the inputs unquantized: "
            'activations="bf16" (--activations bf16).'
        )
    return MissingTensor(message, hint)


@dataclass(frozen=True)
class Contents:
    """Every tensor of a header, in exactly one of `linears`, `plain` and `ignored`.

    linears        {module: StoredLinear}
    plain          keys of unquantized tensors
    ignored        {key: reason}
    evidence       one sentence for each conclusion about the layout
    assumed        fields of Layout that nothing in the header proves
    split_linears  {module: stored linears that hold its input features, in order}
    problems       {module: what is wrong with the scales} of layers that layout detection skipped
    unscaled       FP8 values are the weights themselves: the file is a cast without scales
    packed         {plain key: scheme that decodes its blocks}
    reshaped       {plain key: shape}, where the file's tensor has another one
    drops_unit_axes   plain tensors may lack leading axes of length 1 that the model's have
    """

    linears: Mapping[str, StoredLinear]
    plain: tuple[str, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()
    assumed: frozenset[str] = frozenset()
    split_linears: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    unscaled: bool = False
    packed: Mapping[str, Scheme] = field(default_factory=dict)
    reshaped: Mapping[str, Shape] = field(default_factory=dict)
    drops_unit_axes: bool = False


class Format(Protocol):
    """One on-disk format. `contents` may raise CheckpointError."""

    name: str
    title: str

    def detect(self, header: Header) -> Match | NoMatch: ...

    def contents(self, header: Header) -> Contents: ...


PART_SUFFIXES = (
    ".weight_scale",
    ".weight_scale_2",
    ".input_scale",
    ".scale_weight",
    ".scale_input",
    ".scale_weight_tensor",
    ".weight_scale_inv",
    ".pre_quant_scale",
    ".weight_zeros",
    ".weight_s_rel",
    ".weight_s_channel",
    ".weight_codebook",
    ".weight_correction",
    ".svdquant_lora_a",
    ".svdquant_lora_b",
    ".qweight",
    ".wscales",
    ".wzeros",
    ".wcscales",
    ".wtscale",
    ".smooth",
    ".smooth_factor",
    ".lora_down",
    ".lora_up",
    ".proj_down",
    ".proj_up",
)
"""Suffixes of tensor names that only parts of quantized layers have, in any format."""


def unclaimed_parts(header: Header, contents: Contents) -> dict[str, str]:
    """Return {tensor named like a part that belongs to no quantized layer: what is wrong}."""
    return {
        key: _describe_unclaimed(header, contents, key)
        for key in contents.plain
        if key.endswith(PART_SUFFIXES)
    }


def _describe_unclaimed(header: Header, contents: Contents, key: str) -> str:
    module = key.rpartition(".")[0]
    where, weight = (
        f"{header.tensors[key].file.name}: {key}",
        header.tensors.get(f"{module}.weight"),
    )
    if module in contents.linears:
        return f"{where} is not a part of a {contents.linears[module].scheme.title} layer"
    status = "has no weight" if weight is None else f"has a weight in {weight.dtype}"
    return f"{where} belongs to no quantized layer; {module} {status}"


DUMMY = "a scale of 1.0 for a weight that is not quantized"
DUMMIES = (".scale_weight", ".scale_input", ".weight_scale", ".input_scale")


def _is_dummy(header: Header, key: str) -> bool:
    """Return whether a tensor is an all-ones scale of an unquantized weight; reads its values."""
    info, weight = header.tensors[key], header.tensors.get(f"{key.rpartition('.')[0]}.weight")
    if (
        not key.endswith(DUMMIES)
        or weight is None
        or weight.dtype not in FLOAT_DTYPES
        or info.dtype not in FLOAT_DTYPES
    ):
        return False
    numbers = math.prod(info.shape)
    return numbers in (1, *weight.shape[:1]) and bool((info.read() == 1).all())


def classify_tensors(
    header: Header,
    linears: Mapping[str, StoredLinear],
    ignored: Mapping[str, str],
    joined: Mapping[str, tuple[str, ...]] | None = None,
) -> Contents:
    """Return Contents; every tensor that is neither part of a linear nor ignored is plain.

    Scales of exactly 1.0 for unquantized weights are ignored: some converters write them.

    Raises  UnexpectedTensor if a quantized layer also has an unquantized weight
    """
    claimed = {key for linear in linears.values() for key in linear.keys.values()} | ignored.keys()
    dummies = [key for key in header.tensors if key not in claimed and _is_dummy(header, key)]
    ignored = {**ignored, **dict.fromkeys(dummies, DUMMY)}
    claimed |= ignored.keys()
    plain = tuple(key for key in header.tensors if key not in claimed)
    for key in plain:
        if key.removesuffix(".weight") in linears:
            raise UnexpectedTensor(
                f"{header.path}: {key} is left over: the layer is quantized, in other tensors"
            )
    return Contents(linears, plain, ignored, split_linears=joined or {})
