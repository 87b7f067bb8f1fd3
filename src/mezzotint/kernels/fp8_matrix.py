"""The FP8 matrix that a layer multiplies its rounded input by, for whoever rounds the input himself."""

from typing import NamedTuple

from torch import Tensor

from mezzotint.kernels.expand import expand, full_bias, has_static_input, input_scale_fp8, weight_scale
from mezzotint.schemes import FP8
from mezzotint.tensor import QuantTensor

BACKENDS = {"scaled_mm", "expand"}
"""Those that multiply by such a matrix."""


class FP8Matrix(NamedTuple):
    """codes e4m3 [out, in]; weight_scale float32 [1] or [out]; bias [out] or None"""

    codes: Tensor
    weight_scale: Tensor
    bias: Tensor | None


def is_fp8_matrix(weight: QuantTensor, backend: str) -> bool:
    """Whether this backend multiplies the rounded input by such a matrix, with nothing before that."""
    scaled_first = weight.scheme is FP8 or has_static_input(weight.parts)
    return backend in BACKENDS and not (scaled_first and "pre_quant_scale" in weight.parts)


def static_input_scale(weight: QuantTensor) -> Tensor | None:
    """What an FP8 input is in units of, float32 [1]; None if each row has a scale of its own."""
    scale = weight.parts.get("input_scale") if weight.scheme is FP8 else input_scale_fp8(weight)
    return None if scale is None else scale.float().reshape(1)


def fp8_matrix(weight: QuantTensor, bias: Tensor | None) -> FP8Matrix:
    """That of a weight that `is_fp8_matrix`, written out first where it is in 4 bits."""
    if weight.scheme is FP8:
        return FP8Matrix(weight.parts["codes"], weight.parts["weight_scale"].float().reshape(-1), bias)
    return FP8Matrix(expand(weight), weight_scale(weight), full_bias(weight, bias))
