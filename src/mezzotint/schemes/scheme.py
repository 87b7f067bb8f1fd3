"""Scheme: the parts of a quantized linear layer, and the arithmetic that all schemes share.

A scheme lists its parts with their dtypes and shapes, decodes them, and quantizes the layer's input
for the GEMM. It is independent of files, byte orders and kernels: parts are always *plain* here
(row-major, low nibble first).

Names of parts, used everywhere:

codes             the quantized weights
weight_scale      float32, one per matrix or output row; multiplies
block_scale       [out, in/group], one per group of consecutive input columns; multiplies
block_zero        [out, in/group], added after the block scale (AWQ)
block_shift       [out, in/group], subtracted after the block scale (quanto)
zero_point        uint8 [out, in/group], subtracted from the codes
codebook          float32 [16], the value of each 4-bit code
row_amax          float32 [out], largest magnitude of each row (LLM.int8)
outlier_threshold float32 [], inputs of this magnitude are not quantized (LLM.int8)
channel_scale     [out], multiplies the rows of an SVDQuant NVFP4 matrix (Nunchaku: wcscales)
global_scale      float32 [], multiplies an NVFP4 matrix (ModelOpt: weight_scale_2)
global_divisor    float32 [], whose rounded reciprocal is global_scale (compressed-tensors)
input_scale       float32 [], divides the layer's input before rounding; multiplies the output
pre_quant_scale   [in], multiplies the layer's input (ModelOpt AWQ and SVD)
smooth            [in], divides the layer's input (Nunchaku: smooth_factor)
lora_down, _up    [rank, in], [out, rank]: low-rank branch on the transformed input z
                  (ModelOpt: svdquant_lora_a, _b)
proj_down, _up    [rank, in], [out, rank]: low-rank branch on the layer's input x (Nunchaku)
shift             float32 [], added to the layer's input before the GEMM (Nunchaku's GELU layers)
rotation          int8 [group, group], signs of a Hadamard matrix that rotates groups of columns
bias              [out], added last

With x the layer's input and R the decoded codes, the layer computes

    z = rotate((x + shift) * pre_quant_scale / smooth)
    y = Q(z) R^T + z lora_down^T lora_up^T + x proj_down^T proj_up^T + bias

where Q quantizes z, or is the identity. The dequantized weights are those that multiply x.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.errors import BadScale, ShapeMismatch
from mezzotint.schemes.rotation import MAX_ROTATION, rotate

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One part of a scheme.

    dtypes    the accepted dtypes
    shapes    (out, in) -> the accepted shapes
    meaning   what error messages call the part
    scale     values must be finite and not negative; a single value must be positive
    signed    a scale may be negative, or zero for the whole matrix
    nonzero   no value may be zero, because the values divide, or undo a division
    rows      the first axis is the layer's output features, if it has that many entries
    columns   the last axis runs along the layer's input features
    packed_scales   plain part -> float32, the scales that lie among its codes, which must be
                    finite; None if the scheme keeps its scales in other parts
    packed_at       where these float16 scales begin, in bytes from the start of a block
    """

    dtypes: tuple[torch.dtype, ...]
    shapes: Callable[[int, int], tuple[Shape, ...]]
    meaning: str
    scale: bool = False
    signed: bool = False
    nonzero: bool = False
    rows: bool = False
    columns: bool = False
    packed_scales: Callable[[Tensor], Tensor] | None = None
    packed_at: tuple[int, ...] = ()

    @property
    def has_scales(self) -> bool:
        """Whether `Scheme.check_values` has anything to check."""
        return self.scale or self.packed_scales is not None


@dataclass(frozen=True)
class Scheme:
    """How a linear layer's weights and inputs are quantized.

    bits                  bits of a code, without the scales
    usual_error           bound of the relative error |W - base| / |base| of correct quantization
    parts                 the parts that every layer of the scheme has
    decode                plain parts -> float32 [out, in], without low-rank branches
    optional              the parts that a layer may have in addition
    encode                weights [out, in] -> plain parts, rounded to nearest; None if missing
    quantize_activation   (x, parts) -> float32 of x's shape, quantized and dequantized for the
                          GEMM; None if the input is not quantized
    static_scale_part     the part with a calibrated scale of the input; None if scales are dynamic
    input_max             largest magnitude of a quantized input, in units of its static scale
    keeps_bias            whether files store the model's bias unchanged
    group                 input features that share a scale; 1 if the shape of block_scale shows it
    """

    name: str
    title: str
    bits: int
    usual_error: float
    parts: Mapping[str, Part]
    decode: Callable[[Parts], Tensor]
    optional: Mapping[str, Part] = field(default_factory=dict)
    encode: Callable[[Tensor], dict[str, Tensor]] | None = None
    quantize_activation: Callable[[Tensor, Parts], Tensor] | None = None
    static_scale_part: str | None = None
    input_max: float | None = None
    keeps_bias: bool = False
    group: int = 1

    def part(self, name: str) -> Part:
        return self.parts[name] if name in self.parts else self.optional[name]

    def quantizes_activation(self, parts: Collection[str], dynamic: bool) -> bool:
        """Return whether a layer with these parts quantizes its input.

        dynamic   without a static scale, compute one at each call
        """
        return self.quantize_activation is not None and (
            dynamic or self.static_scale_part is None or self.static_scale_part in parts
        )

    def dequantize(self, parts: Parts) -> Tensor:
        """Return the weights that multiply the layer's input, low-rank branches included.

        Returns   float32 [out, in]
        """
        weights = self.decode(parts)
        if "lora_down" in parts:
            weights = weights + parts["lora_up"].float() @ parts["lora_down"].float()
        weights = _scale_columns(_rotate(weights, parts), parts)
        if "proj_down" in parts:
            weights = weights + parts["proj_up"].float() @ parts["proj_down"].float()
        return weights

    def dequantize_bias(self, parts: Parts) -> Tensor | None:
        """Return the bias for `dequantize`, float32 [out]; it includes a shift's contribution."""
        bias = parts["bias"].float() if "bias" in parts else None
        if "shift" not in parts:
            return bias
        weights = _scale_columns(_rotate(self.decode(parts), parts), parts)
        shift = weights.sum(dim=1) * parts["shift"].float()
        return shift if bias is None else bias + shift

    def linear(self, x: Tensor, parts: Parts, quantize: bool) -> Tensor:
        """Compute the layer without its bias: x [..., in] to float32 [..., out].

        quantize   quantize the transformed input as the scheme does
        """
        x = x.float()
        z = transform_activation(x, parts)
        quantized = (
            self.quantize_activation(z, parts)
            if quantize and self.quantize_activation is not None
            else z
        )
        y = F.linear(quantized, self.decode(parts))
        if "lora_down" in parts:
            y = y + F.linear(F.linear(z, parts["lora_down"].float()), parts["lora_up"].float())
        if "proj_down" in parts:
            y = y + F.linear(F.linear(x, parts["proj_down"].float()), parts["proj_up"].float())
        return y

    def check_part(
        self, name: str, found: Shape, dtype: torch.dtype, shape: tuple[int, int], where: str
    ) -> None:
        """Check that a plain part of this shape and dtype can belong to an (out, in) matrix.

        Raises   ShapeMismatch
        """
        part = self.part(name)
        out_features, in_features = shape
        if self.group > 1 and in_features % 2:
            raise ShapeMismatch(
                f"{where}: {in_features} input features are an odd number ({self.title})"
            )
        allowed = part.shapes(out_features, in_features)
        if not any(_fits(found, shape) for shape in allowed):
            raise ShapeMismatch(
                f"{where} has shape {list(found)}, "
                f"expected {' or '.join(str(list(s)) for s in allowed)} "
                f"({part.meaning}, {self.title} of {out_features} x {in_features})",
                "run `mezzotint inspect PATH` to see the file's layout.",
            )
        if dtype not in part.dtypes:
            raise ShapeMismatch(
                f"{where} is {dtype}, expected {' or '.join(map(str, part.dtypes))}"
            )

    def check_values(self, name: str, values: Tensor, where: str) -> None:
        """Check that a scale is finite and not negative, and nonzero where required.

        Raises   BadScale
        """
        packed_scales = self.part(name).packed_scales
        if packed_scales is not None and not bool(torch.isfinite(packed_scales(values)).all()):
            raise BadScale(
                f"{where} holds a block whose scale is not finite",
                "the file is damaged; export it again.",
            )
        check_scale(self.part(name), values, where)


def check_scale(part: Part, values: Tensor, where: str) -> None:
    """Check the values of a part that is a scale; see `Scheme.check_values`.

    Raises   BadScale
    """
    if not part.scale:
        return
    if values.dtype == torch.float8_e4m3fn and values.numel() > 1 and _all_positive_e4m3(values):
        return
    numbers = values.float()
    if not bool(torch.isfinite(numbers).all()):
        raise BadScale(
            f"{where} holds a value that is not finite", "the file is damaged; export it again."
        )
    if part.signed:
        return
    zero_is_bad = numbers.numel() == 1 or part.nonzero
    if bool((numbers < 0).any()) or (zero_is_bad and bool((numbers == 0).any())):
        raise BadScale(f"{where} holds {numbers.min().item():g}, expected a positive number")


def _all_positive_e4m3(values: Tensor) -> bool:
    """Return whether every code is finite and has no sign bit."""
    # 0x7F and 0xFF are NaN, and bit 7 is the sign, so all good codes are below 0x7F.
    return int(values.view(torch.uint8).max()) < 0x7F


def _fits(have: Shape, allowed: Shape) -> bool:
    return len(have) == len(allowed) and all(
        a in (h, ANY_RANK) for h, a in zip(have, allowed, strict=True)
    )


def scalar(_out: int, _in: int) -> tuple[Shape, ...]:
    """Return the shapes of a single number."""
    return ((), (1,))


def scalar_or_per_row(out: int, _in: int) -> tuple[Shape, ...]:
    """Return the shapes of a single number, or of one per output feature."""
    return ((), (1,), (out,), (out, 1))


def per_column(_out: int, in_: int) -> tuple[Shape, ...]:
    """Return the shape of one number per input feature."""
    return ((in_,),)


def transform_activation(x: Tensor, parts: Parts) -> Tensor:
    """Return the transformed input z of the module's formula: x [..., in] to float32 [..., in]."""
    x = x.float()
    x = _scale_columns(x + parts["shift"].float() if "shift" in parts else x, parts)
    return _rotate(x, parts)


def _rotate(values: Tensor, parts: Parts) -> Tensor:
    return rotate(values, parts["rotation"]) if "rotation" in parts else values


def _scale_columns(values: Tensor, parts: Parts) -> Tensor:
    """Multiply values [..., in] by pre_quant_scale and divide them by smooth, if present."""
    if "pre_quant_scale" in parts:
        values = values * parts["pre_quant_scale"].float()
    if "smooth" in parts:
        values = values / parts["smooth"].float()
    return values


def per_group(group: int) -> Callable[[int, int], tuple[Shape, ...]]:
    """Return the shapes of one number per output feature and `group` input features."""
    return lambda out, in_: ((out, in_ // group),)


def per_any_group(out: int, in_: int) -> tuple[Shape, ...]:
    """Return the shapes of one number per output feature and group, of any size."""
    small = [size for size in range(1, math.isqrt(in_) + 1) if in_ % size == 0]
    counts = {*small, *(in_ // size for size in small)}
    return tuple((out, count) for count in sorted(counts))


def square_of_columns(_out: int, in_: int) -> tuple[Shape, ...]:
    """Return the shapes of rotations: powers of two that divide the input features."""
    sizes = (2**power for power in range(1, MAX_ROTATION.bit_length()))
    return tuple((size, size) for size in sizes if in_ % size == 0)


FLOAT32 = (torch.float32,)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
HALF_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ANY_RANK = -1
"""Stands for any length in a part's shape, such as the rank of a low-rank branch."""
INPUT_SCALE = Part(FLOAT32, scalar, "static scale of the layer's input", scale=True)
ROTATION = Part((torch.int8,), square_of_columns, "signs of a Hadamard rotation of the columns")
"""A part of schemes whose backends apply it: a backend that ignored it would compute nonsense."""
COMMON_PARTS = {
    "bias": Part((*FLOAT_DTYPES, *FP8_DTYPES), lambda out, _in: ((out,),), "bias", rows=True),
    "pre_quant_scale": Part(
        FLOAT_DTYPES,
        per_column,
        "per-column factor of the layer's input",
        scale=True,
        nonzero=True,
        columns=True,
    ),
    "smooth": Part(
        FLOAT_DTYPES,
        per_column,
        "per-column divisor of the layer's input",
        scale=True,
        nonzero=True,
        columns=True,
    ),
    "shift": Part(FLOAT32, scalar, "offset of the layer's input"),
    "lora_down": Part(
        FLOAT_DTYPES, lambda _out, in_: ((ANY_RANK, in_),), "low-rank branch, down", columns=True
    ),
    "lora_up": Part(
        FLOAT_DTYPES, lambda out, _in: ((out, ANY_RANK),), "low-rank branch, up", rows=True
    ),
    "proj_down": Part(
        FLOAT_DTYPES, lambda _out, in_: ((ANY_RANK, in_),), "low-rank branch, down", columns=True
    ),
    "proj_up": Part(
        FLOAT_DTYPES, lambda out, _in: ((out, ANY_RANK),), "low-rank branch, up", rows=True
    ),
}
"""Parts that a layer of any scheme may have in addition to its codes and scales."""
