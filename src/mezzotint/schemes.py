"""What the stored numbers mean: one `Scheme` for each way of writing a linear layer's weights.

A scheme knows the parts that it needs, their dtypes and shapes, how to decode them, and how the layer's input is
quantized before the product. It knows nothing of files, of byte order, or of kernels: parts are always *plain* here
(row-major, low nibble first).

Names of parts, used everywhere:

codes             the quantized weights
weight_scale      float32, one for the matrix or one for each output row; multiplies
block_scale       one for each group of consecutive input columns; multiplies
global_scale      float32 [], multiplies all of an NVFP4 matrix (ModelOpt: weight_scale_2)
input_scale       float32 [], divides the layer's input before rounding, multiplies the product
bias              [out], added last

With x the layer's input and R the decoded codes, the layer is

    y = Q(x) R^T + bias            Q rounds x as the scheme says, or not at all
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.errors import BadScale, ShapeMismatch

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]

E4M3_MAX = 448.0
E2M1_MAX = 6.0
NVFP4_GROUP = 16
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each 4-bit code: sign in bit 3, two exponent bits, one mantissa bit. Source: OCP MX v1.0, table 4."""


@dataclass(frozen=True)
class Part:
    """What one part of a scheme looks like: accepted dtypes, and its accepted shapes for (out, in).

    scale   its values must be finite and positive
    rows    its first axis is the layer's output features, where it has that many entries
    """

    dtypes: tuple[torch.dtype, ...]
    shapes: Callable[[int, int], tuple[Shape, ...]]
    meaning: str
    scale: bool = False
    rows: bool = False


@dataclass(frozen=True)
class Scheme:
    """How a linear layer's weights and inputs are written as numbers.

    parts            what every layer of the scheme has; `optional` is what it may have besides
    decode           plain parts -> float32 [out, in], the codes' own real values
    quantize_input   (x, parts) -> float32 of x's shape: x rounded for the product
    static_input     the part that `quantize_input` needs, where it needs one
    """

    name: str
    title: str
    bits: float
    parts: Mapping[str, Part]
    decode: Callable[[Parts], Tensor]
    optional: Mapping[str, Part] = field(default_factory=dict)
    quantize_input: Callable[[Tensor, Parts], Tensor] | None = None
    static_input: str | None = None
    group: int = 1

    def part(self, name: str) -> Part:
        return self.parts[name] if name in self.parts else self.optional[name]

    def quantizes_input(self, parts: Collection[str]) -> bool:
        """Whether a layer with these parts says how its input is to be rounded."""
        return self.quantize_input is not None and (self.static_input is None or self.static_input in parts)

    def dequantize(self, parts: Parts) -> Tensor:
        """The real weights that the parts stand for, float32 [out, in]."""
        return self.decode(parts)

    def linear(self, x: Tensor, parts: Parts, quantize: bool) -> Tensor:
        """The layer's product without its bias: x [..., in] to float32 [..., out]; `quantize` rounds x first."""
        real = x.float()
        if quantize and self.quantize_input is not None and self.quantizes_input(parts):
            real = self.quantize_input(real, parts)
        return F.linear(real, self.decode(parts))

    def check_part(self, name: str, have: Shape, dtype: torch.dtype, shape: tuple[int, int], where: str) -> None:
        """Raise ShapeMismatch unless a plain part of this shape and dtype can belong to an (out, in) matrix."""
        part = self.part(name)
        out_features, in_features = shape
        if in_features % self.group:
            raise ShapeMismatch(f"{where}: {in_features} input features are no multiple of {self.group} ({self.title})")
        allowed = part.shapes(out_features, in_features)
        if have not in allowed:
            raise ShapeMismatch(
                f"{where} has shape {list(have)}, expected {' or '.join(str(list(s)) for s in allowed)} "
                f"({part.meaning}, {self.title} of {out_features} x {in_features})",
                "run `mezzotint inspect PATH` to see how the file is laid out.",
            )
        if dtype not in part.dtypes:
            raise ShapeMismatch(f"{where} is {dtype}, expected {' or '.join(map(str, part.dtypes))}")

    def check_values(self, name: str, values: Tensor, where: str) -> None:
        """Raise BadScale unless a scale is finite and not negative, and a single one not zero."""
        if not self.part(name).scale:
            return
        numbers = values.float()
        if not bool(torch.isfinite(numbers).all()):
            raise BadScale(f"{where} holds a value that is not finite", "the export is damaged; make it again.")
        if bool((numbers < 0).any()) or (numbers.numel() == 1 and numbers.item() == 0):
            raise BadScale(f"{where} holds {numbers.min().item():g}, expected a positive number")


def expand_e2m1(codes: Tensor) -> Tensor:
    """Values of packed 4-bit floats: uint8 [..., n/2], low nibble first, to float32 [..., n]."""
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)
    nibbles = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    return table[nibbles.int()]


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest E2M1 value, ties to the even mantissa, magnitudes above 6 saturate; float32 in and out.

    The grid is 0.5 apart up to 2, then 1, then 2; `torch.round` is ties-to-even on each of the three, and the even
    multiple of a step is the value whose mantissa bit is 0.
    """
    magnitude = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


def round_e4m3(x: Tensor) -> Tensor:
    """Nearest float8_e4m3fn, saturating at ±448; float32 in, float8_e4m3fn out."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_fp8(parts: Parts) -> Tensor:
    """Real weights of an FP8 matrix: codes * weight_scale, in float32.

    codes          float8_e4m3fn [out, in]
    weight_scale   float32 [], [1], or [out] (one per row)
    Returns        float32 [out, in]
    """
    scale = parts["weight_scale"].float()
    return parts["codes"].float() * (scale[:, None] if scale.numel() > 1 else scale.reshape(()))


def quantize_input_fp8(x: Tensor, parts: Parts) -> Tensor:
    """x rounded to e4m3 in units of the static input_scale, in float32.

    Source   ModelOpt FP8: input_scale = amax / 448
    """
    scale = parts["input_scale"].float().reshape(())
    return round_e4m3(x.float() / scale).float() * scale


def decode_nvfp4(parts: Parts) -> Tensor:
    """Real weights of an NVFP4 matrix: E2M1[code] * block_scale * global_scale, in float32.

    codes          uint8 [out, in/2], low nibble is the even column
    block_scale    float8_e4m3fn [out, in/16], row-major
    global_scale   float32 [], multiplies
    Returns        float32 [out, in]
    Source         OCP MX v1.0 for E2M1; ModelOpt: global_scale = amax / (6 * 448)
    """
    values = expand_e2m1(parts["codes"])
    scale = parts["block_scale"].float() * parts["global_scale"].float().reshape(())
    return (_blocks(values) * scale.unsqueeze(-1)).flatten(-2)


def quantize_input_nvfp4(x: Tensor, parts: Parts) -> Tensor:
    """x rounded to NVFP4 with one e4m3 scale per 16 columns, in units of the static input_scale; float32.

    block scale = e4m3(amax(block) / 6 / input_scale); code = E2M1(x / (block scale * input_scale)). A block whose
    scale rounds to zero becomes zero, as the hardware's quantizers have it.
    Source   ModelOpt NVFP4: input_scale = amax / (6 * 448); comfy-kitchen's quantize_nvfp4 gives the same numbers
    """
    unit = parts["input_scale"].float().reshape(())
    blocks = _blocks(x.float())
    block_scale = round_e4m3(blocks.abs().amax(-1, keepdim=True) / E2M1_MAX / unit).float() * unit
    safe = torch.where(block_scale > 0, block_scale, torch.ones_like(block_scale))
    return (round_e2m1(blocks / safe) * block_scale).flatten(-2)


def _blocks(x: Tensor) -> Tensor:
    """[..., n] to [..., n / 16, 16]"""
    return x.reshape(*x.shape[:-1], -1, NVFP4_GROUP)


def _scalar(_out: int, _in: int) -> tuple[Shape, ...]:
    return ((), (1,))


def _scalar_or_rows(out: int, _in: int) -> tuple[Shape, ...]:
    return ((), (1,), (out,), (out, 1))


_F32 = (torch.float32,)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INPUT_SCALE = Part(_F32, _scalar, "static scale of the layer's input", scale=True)
_COMMON = {
    "bias": Part(_FLOATS, lambda out, _in: ((out,),), "bias", rows=True),
}

FP8 = Scheme(
    name="fp8",
    title="FP8 (e4m3)",
    bits=8,
    parts={
        "codes": Part((torch.float8_e4m3fn,), lambda out, in_: ((out, in_),), "e4m3 weights", rows=True),
        "weight_scale": Part(_F32, _scalar_or_rows, "scale of the weights", scale=True, rows=True),
    },
    optional={"input_scale": _INPUT_SCALE} | _COMMON,
    decode=decode_fp8,
    quantize_input=quantize_input_fp8,
    static_input="input_scale",
)

NVFP4 = Scheme(
    name="nvfp4",
    title="NVFP4",
    bits=4.5,
    group=NVFP4_GROUP,
    parts={
        "codes": Part((torch.uint8,), lambda out, in_: ((out, in_ // 2),), "two E2M1 codes a byte", rows=True),
        "block_scale": Part(
            (torch.float8_e4m3fn,),
            lambda out, in_: ((out, in_ // NVFP4_GROUP),),
            "one e4m3 scale per 16 columns",
            scale=True,
            rows=True,
        ),
        "global_scale": Part(_F32, _scalar, "scale of the whole matrix", scale=True),
    },
    optional={"input_scale": _INPUT_SCALE} | _COMMON,
    decode=decode_nvfp4,
    quantize_input=quantize_input_nvfp4,
    static_input="input_scale",
)

SCHEMES = {scheme.name: scheme for scheme in (FP8, NVFP4)}
