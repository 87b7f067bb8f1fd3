"""The INT8 form of a layer's weight, for callers that quantize the activation themselves."""

import torch
from torch import Tensor

from mezzotint.schemes import INT4_ROWS, INT4_ROWS_A8, INT8, W4A8
from mezzotint.schemes.int8 import INT8_MAX
from mezzotint.tensor import QuantTensor

SCHEMES = (INT8, INT4_ROWS, INT4_ROWS_A8, W4A8)
"""Schemes whose weights are integers of 8 bits or fewer, times a scale per row or matrix."""
INT8_BACKENDS = {"int8_mm"}
"""Backends that multiply by such a weight."""


def quantizes_rows_to_int8(weight: QuantTensor, backend: str) -> bool:
    """Return whether the backend quantizes the input to INT8, after a rotation at most, by row."""
    return backend in INT8_BACKENDS and not {"pre_quant_scale", "input_scale"} & set(weight.parts)


def get_int8_weight(weight: QuantTensor) -> tuple[Tensor, Tensor]:
    """Return the codes, int8 [out, in], and their scale, float32 [1] or [out].

    4-bit codes are unpacked by the kernel that `prepare` imported.
    """
    parts = weight.parts
    if weight.scheme is INT8:
        return parts["codes"], parts["weight_scale"].reshape(-1)
    codes: Tensor = torch.ops.mezzotint.unpack_int8(
        parts["codes"], parts.get("block_scale"), parts.get("codebook")
    )
    return codes, parts["channel_scale" if weight.scheme is W4A8 else "weight_scale"].reshape(-1)


def static_int8_scale(weight: QuantTensor) -> Tensor | None:
    """Return the static scale of an INT8 input, float32; None if the scale is per row."""
    scale = weight.parts.get("input_scale")
    if scale is None or weight.scheme.input_max == INT8_MAX:
        return scale
    # A scheme with 4-bit inputs has amax / 7; the GEMM keeps 8 bits of them.
    assert weight.scheme.input_max is not None  # noqa: S101
    return scale * (weight.scheme.input_max / INT8_MAX)
