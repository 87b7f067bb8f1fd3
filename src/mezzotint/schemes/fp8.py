"""FP8 (e4m3) weights and inputs, with one scale for the matrix or one for each output row."""

import torch
from torch import Tensor

from mezzotint.schemes.groups import one_where_zero
from mezzotint.schemes.rounding import E4M3_MAX, round_e4m3
from mezzotint.schemes.scheme import COMMON, F32, INPUT_SCALE, Part, Parts, Scheme, scalar_or_rows


def decode_fp8(parts: Parts) -> Tensor:
    """Real weights of an FP8 matrix: codes * weight_scale, in float32.

    codes          float8_e4m3fn [out, in]
    weight_scale   float32 [], [1], [out] or [out, 1] (one per row)
    Returns        float32 [out, in]
    """
    scale = parts["weight_scale"].float()
    return parts["codes"].float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))


def encode_fp8(weights: Tensor, by_row: bool = False) -> dict[str, Tensor]:
    """The nearest FP8 matrix: weight_scale = amax / 448 of the matrix or of each row, 1 where all is zero.

    weights   [out, in], any float dtype
    Returns   the parts that `decode_fp8` takes
    """
    values = weights.float()
    amax = values.abs().amax(1) if by_row else values.abs().amax()
    scale = one_where_zero(amax / E4M3_MAX)
    return {"codes": round_e4m3(values / (scale[:, None] if by_row else scale)), "weight_scale": scale}


def quantize_input_fp8(x: Tensor, parts: Parts) -> Tensor:
    """x rounded to e4m3 in units of the static input_scale, or else of amax / 448 of each row of x; in float32.

    Source   ModelOpt FP8: input_scale = amax / 448
    """
    x = x.float()
    scale = parts["input_scale"].float().reshape(()) if "input_scale" in parts else input_scale_by_row(x)
    return round_e4m3(x / scale).float() * scale


def input_scale_by_row(x: Tensor) -> Tensor:
    """The dynamic scale of each row of an input [..., in]: amax / 448, one for a row of zeros; float32 [..., 1]."""
    return one_where_zero(x.float().abs().amax(-1, keepdim=True) / E4M3_MAX)


FP8 = Scheme(
    name="fp8",
    title="FP8 (e4m3)",
    parts={
        "codes": Part((torch.float8_e4m3fn,), lambda out, in_: ((out, in_),), "e4m3 weights", rows=True, columns=True),
        "weight_scale": Part(F32, scalar_or_rows, "scale of the weights", scale=True, rows=True),
    },
    optional={"input_scale": INPUT_SCALE} | COMMON,
    decode=decode_fp8,
    quantize_input=quantize_input_fp8,
    static_input="input_scale",
)
