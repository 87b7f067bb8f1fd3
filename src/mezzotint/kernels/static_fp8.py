"""The FP8 matrix of a layer with one scale for all its weights and one, measured beforehand, for all its inputs."""

from typing import NamedTuple

from torch import Tensor

from mezzotint.kernels.expand import expand, input_scale_fp8, weight_scale
from mezzotint.schemes import FP8
from mezzotint.tensor import QuantTensor

BACKENDS = {"scaled_mm", "expand"}
"""Those that multiply by such a matrix."""


class StaticFP8(NamedTuple):
    """codes e4m3 [out, in]; scales float32 [1]"""

    codes: Tensor
    weight_scale: Tensor
    input_scale: Tensor


def has_static_fp8(weight: QuantTensor, backend: str) -> bool:
    """Whether the weight, as this backend multiplies by it, is such a matrix and nothing else."""
    apart = {"pre_quant_scale", "smooth", "shift"} & set(weight.parts)
    if backend not in BACKENDS or apart or "input_scale" not in weight.parts:
        return False
    return weight.scheme is not FP8 or weight.parts["weight_scale"].numel() == 1


def static_input_scale(weight: QuantTensor) -> Tensor:
    """Of a weight that `has_static_fp8`, float32 [1]."""
    scale = weight.parts["input_scale"] if weight.scheme is FP8 else input_scale_fp8(weight)
    assert scale is not None  # noqa: S101
    return scale.float().reshape(1)


def static_fp8(weight: QuantTensor) -> StaticFP8:
    """The matrix of a weight that `has_static_fp8`, written out first where it is in 4 bits."""
    if weight.scheme is FP8:
        codes, scale = weight.parts["codes"], weight.parts["weight_scale"].float().reshape(1)
    else:
        codes, scale = expand(weight), weight_scale(weight)
    return StaticFP8(codes, scale, static_input_scale(weight))
