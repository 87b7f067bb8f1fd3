"""What a scheme is: the parts it is made of, and the arithmetic that all schemes share.

A scheme knows the parts that it needs, their dtypes and shapes, how to decode them, and how the layer's input is
quantized before the product. It knows nothing of files, of byte order, or of kernels: parts are always *plain* here
(row-major, low nibble first).

Names of parts, used everywhere:

codes             the quantized weights
weight_scale      float32, one for the matrix or one for each output row; multiplies
block_scale       [out, in/group], one for each group of consecutive input columns; multiplies
block_zero        [out, in/group], added after the block scale (AWQ)
channel_scale     [out], multiplies the rows of an SVDQuant NVFP4 matrix (Nunchaku: wcscales)
global_scale      float32 [], multiplies all of an NVFP4 matrix (ModelOpt: weight_scale_2)
input_scale       float32 [], divides the layer's input before rounding, multiplies the product
pre_quant_scale   [in], multiplies the layer's input (ModelOpt AWQ and SVD)
smooth            [in], divides the layer's input (Nunchaku: smooth_factor)
lora_down, _up    [rank, in], [out, rank]: low-rank branch on the *scaled* input (ModelOpt: svdquant_lora_a, _b)
proj_down, _up    [rank, in], [out, rank]: low-rank branch on the layer's own input (Nunchaku)
shift             float32 [], added to the layer's own input on its way to the codes (Nunchaku's GELU layers)
bias              [out], added last

With x the layer's input and R the decoded codes, the layer is

    z = (x + shift) * pre_quant_scale / smooth
    y = Q(z) R^T + z lora_down^T lora_up^T + x proj_down^T proj_up^T + bias

where Q rounds z as the scheme says, or not at all. The real weights are what multiplies x.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.errors import BadScale, ShapeMismatch

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What one part of a scheme looks like: accepted dtypes, and its accepted shapes for (out, in).

    scale     its values must be finite and not negative, a single one positive
    nonzero   none of its values may be zero: they divide, or undo a division
    rows      its first axis is the layer's output features, where it has that many entries
    columns   its last axis runs along the layer's input features
    """

    dtypes: tuple[torch.dtype, ...]
    shapes: Callable[[int, int], tuple[Shape, ...]]
    meaning: str
    scale: bool = False
    nonzero: bool = False
    rows: bool = False
    columns: bool = False


@dataclass(frozen=True)
class Scheme:
    """How a linear layer's weights and inputs are written as numbers.

    bits                  bits of one weight's code, without the scales
    usual_error           relative error of a weight, |W - base| / |base|, that rounding does not exceed
    parts                 the parts that every layer of the scheme has
    decode                plain parts -> float32 [out, in], the values of the codes alone
    optional              the parts that a layer may have in addition
    encode                weights [out, in] -> plain parts, by rounding to nearest; None if there is no encoder
    quantize_activation   (x, parts) -> float32 of x's shape, x quantized for the GEMM; None for an exact input
    static_scale_part     the part with a calibrated scale of the input; None if the scale always comes from x
    input_max             largest magnitude of a quantized input, in units of its static scale
    keeps_bias            whether files store the model's own bias, unchanged
    group                 input features that share a scale
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
        """Whether a layer's input is rounded: by a static scale among its parts, or by one computed at each call."""
        return self.quantize_activation is not None and (
            dynamic or self.static_scale_part is None or self.static_scale_part in parts
        )

    def dequantize(self, parts: Parts) -> Tensor:
        """The real weights that the parts stand for, float32 [out, in]: what multiplies the layer's own input."""
        weights = self.decode(parts)
        if "lora_down" in parts:
            weights = weights + parts["lora_up"].float() @ parts["lora_down"].float()
        weights = _scale_columns(weights, parts)
        if "proj_down" in parts:
            weights = weights + parts["proj_up"].float() @ parts["proj_down"].float()
        return weights

    def dequantize_bias(self, parts: Parts) -> Tensor | None:
        """The bias that goes with `dequantize`, float32 [out]: that of a shifted layer takes in what the shift adds."""
        bias = parts["bias"].float() if "bias" in parts else None
        if "shift" not in parts:
            return bias
        of_shift = _scale_columns(self.decode(parts), parts).sum(dim=1) * parts["shift"].float()
        return of_shift if bias is None else bias + of_shift

    def linear(self, x: Tensor, parts: Parts, quantize: bool) -> Tensor:
        """The layer's product without its bias: x [..., in] to float32 [..., out]; `quantize` rounds the input."""
        own = x.float()
        scaled = transform_activation(own, parts)
        rounded = (
            self.quantize_activation(scaled, parts)
            if quantize and self.quantize_activation is not None
            else scaled
        )
        y = F.linear(rounded, self.decode(parts))
        if "lora_down" in parts:
            y = y + F.linear(F.linear(scaled, parts["lora_down"].float()), parts["lora_up"].float())
        if "proj_down" in parts:
            y = y + F.linear(F.linear(own, parts["proj_down"].float()), parts["proj_up"].float())
        return y

    def check_part(
        self, name: str, found: Shape, dtype: torch.dtype, shape: tuple[int, int], where: str
    ) -> None:
        """Raise ShapeMismatch unless a plain part of this shape and dtype can belong to an (out, in) matrix."""
        part = self.part(name)
        out_features, in_features = shape
        if self.group > 1 and in_features % 2:
            raise ShapeMismatch(
                f"{where}: {in_features} input features are an odd number ({self.title})"
            )
        allowed = part.shapes(out_features, in_features)
        if not any(_fits(found, shape) for shape in allowed):
            raise ShapeMismatch(
                f"{where} has shape {list(found)}, expected {' or '.join(str(list(s)) for s in allowed)} "
                f"({part.meaning}, {self.title} of {out_features} x {in_features})",
                "run `mezzotint inspect PATH` to see how the file is laid out.",
            )
        if dtype not in part.dtypes:
            raise ShapeMismatch(
                f"{where} is {dtype}, expected {' or '.join(map(str, part.dtypes))}"
            )

    def check_values(self, name: str, values: Tensor, where: str) -> None:
        """Raise BadScale unless a scale is finite and not negative, and a single one not zero."""
        if not self.part(name).scale:
            return
        if (
            values.dtype == torch.float8_e4m3fn
            and values.numel() > 1
            and _all_positive_e4m3(values)
        ):
            return
        numbers = values.float()
        if not bool(torch.isfinite(numbers).all()):
            raise BadScale(
                f"{where} holds a value that is not finite", "the export is damaged; make it again."
            )
        zero_is_bad = numbers.numel() == 1 or self.part(name).nonzero
        if bool((numbers < 0).any()) or (zero_is_bad and bool((numbers == 0).any())):
            raise BadScale(f"{where} holds {numbers.min().item():g}, expected a positive number")


def _all_positive_e4m3(values: Tensor) -> bool:
    """Whether every code is a finite number without a minus sign: 0x7F and 0xFF are not a number, bit 7 is the sign."""
    return int(values.view(torch.uint8).max()) < 0x7F


def _fits(have: Shape, allowed: Shape) -> bool:
    return len(have) == len(allowed) and all(
        a in (h, ANY_RANK) for h, a in zip(have, allowed, strict=True)
    )


def scalar(_out: int, _in: int) -> tuple[Shape, ...]:
    """Shapes of a single number."""
    return ((), (1,))


def scalar_or_per_row(out: int, _in: int) -> tuple[Shape, ...]:
    """Shapes of a single number, or of one for each output feature."""
    return ((), (1,), (out,), (out, 1))


def per_column(_out: int, in_: int) -> tuple[Shape, ...]:
    """Shape of one number for each input feature."""
    return ((in_,),)


def transform_activation(x: Tensor, parts: Parts) -> Tensor:
    """What a layer's codes multiply once it is rounded, z of the module's formula: x [..., in] to float32 [..., in]."""
    x = x.float()
    return _scale_columns(x + parts["shift"].float() if "shift" in parts else x, parts)


def _scale_columns(values: Tensor, parts: Parts) -> Tensor:
    """values [..., in] times pre_quant_scale and divided by smooth, where the layer has them."""
    if "pre_quant_scale" in parts:
        values = values * parts["pre_quant_scale"].float()
    if "smooth" in parts:
        values = values / parts["smooth"].float()
    return values


def per_group(group: int) -> Callable[[int, int], tuple[Shape, ...]]:
    """Shape of one number for each output feature and each `group` input features."""
    return lambda out, in_: ((out, in_ // group),)


FLOAT32 = (torch.float32,)
HALF_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ANY_RANK = -1
"""Stands for any length in a part's shape: the rank of a low-rank branch."""
INPUT_SCALE = Part(FLOAT32, scalar, "static scale of the layer's input", scale=True)
COMMON_PARTS = {
    "bias": Part(
        (*FLOAT_DTYPES, torch.float8_e4m3fn), lambda out, _in: ((out,),), "bias", rows=True
    ),
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
    "shift": Part(FLOAT32, scalar, "what is added to the layer's input"),
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
"""What a layer of any scheme may have besides its codes and their scales."""
