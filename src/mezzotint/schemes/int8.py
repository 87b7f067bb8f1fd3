"""INT8 weights and inputs, with one scale per output row or per matrix."""

import torch
from torch import Tensor

from mezzotint.schemes.groups import replace_zero_with_one
from mezzotint.schemes.scheme import (
    COMMON_PARTS,
    FLOAT32,
    INPUT_SCALE,
    ROTATION,
    Part,
    Parts,
    Scheme,
    scalar_or_per_row,
)

INT8_MAX = 127.0


def decode_int8(parts: Parts) -> Tensor:
    """Dequantize an INT8 matrix: codes * weight_scale.

    codes          int8 [out, in]
    weight_scale   float32 [], [1], or one per row: [out] (ModelOpt) or [out, 1] (comfy-kitchen)
    Returns        float32 [out, in]
    Source         ModelOpt: weight_scale = amax of the row / 127
    """
    scale = parts["weight_scale"].float()
    return parts["codes"].float() * (
        scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
    )


def encode_int8(weights: Tensor) -> dict[str, Tensor]:
    """Quantize weights [out, in] to [-127, 127] with one scale per row, amax / 127.

    Returns   the parts of `decode_int8`, with scales [out, 1] as ComfyUI stores them
    """
    integers, scale = to_int8(weights, None)
    return {"codes": integers.to(torch.int8), "weight_scale": scale}


def to_int8(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize x [..., columns] to integers of [-128, 127].

    input_scale   float32, one element, or None for one scale per row: amax / 127
    Returns       float32 integers of x's shape; scale float32, [1, 1] or [..., 1]
    """
    x = x.float()
    if input_scale is None:
        scale = replace_zero_with_one(x.abs().amax(-1, keepdim=True) / INT8_MAX)
    else:
        scale = input_scale.float().reshape(1, 1)
    return torch.clamp(torch.round(x / scale), -INT8_MAX - 1, INT8_MAX), scale


def quantize_activation_int8(x: Tensor, parts: Parts) -> Tensor:
    """Quantize x to [-128, 127] with the static input_scale, or else with amax / 127 of each row.

    Returns   float32 of x's shape, dequantized
    """
    integers, scale = to_int8(x, parts.get("input_scale"))
    return (integers * scale).reshape(x.shape)


SCHEME = Scheme(
    name="int8",
    title="INT8",
    bits=8,
    usual_error=0.08,
    keeps_bias=True,
    parts={
        "codes": Part(
            (torch.int8,), lambda out, in_: ((out, in_),), "int8 weights", rows=True, columns=True
        ),
        "weight_scale": Part(
            FLOAT32,
            lambda out, in_: (*scalar_or_per_row(out, in_), (out, 1)),
            "scale of the weights",
            scale=True,
            rows=True,
        ),
    },
    optional={"input_scale": INPUT_SCALE, "rotation": ROTATION} | COMMON_PARTS,
    decode=decode_int8,
    encode=encode_int8,
    input_max=INT8_MAX,
    quantize_activation=quantize_activation_int8,
    static_scale_part="input_scale",
)
