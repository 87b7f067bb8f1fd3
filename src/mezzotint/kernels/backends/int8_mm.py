"""INT8 GEMM on tensor cores, for INT8 weights and for 4-bit weights that stand for integers.

4-bit weights stay in 4 bits in memory. They are unpacked to INT8 just before each GEMM.
"""

import importlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.fp8_gemm import apply_pre_quant_scale
from mezzotint.kernels.int8_gemm import GEMM_ALIGNMENT, int8_gemm, quantize_activation
from mezzotint.kernels.requirements import (
    TRITON,
    check_requirements,
    require_int8_gpu,
    require_known_parts,
    require_multiple_of,
    require_quantized_activation,
    require_scheme,
)
from mezzotint.kernels.target import Target
from mezzotint.schemes import INT4_ROWS, INT4_ROWS_A8, INT8, W4A8
from mezzotint.schemes.int8 import INT8_MAX
from mezzotint.tensor import PLAIN, QuantTensor

SCHEMES = (INT8, INT4_ROWS, INT4_ROWS_A8, W4A8)
OPTIONAL_PARTS = {"input_scale", "pre_quant_scale", "rotation", "codebook"}
ROTATIONS = (16, 32, 64, 128, 256)
"""Groups whose Hadamard matrix fits the tensor cores' tiles and shared memory."""


class INT8MM:
    name = "int8_mm"
    priority = 10
    weight_layout = PLAIN
    schemes = SCHEMES

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return check_requirements(
            *int8_requirements(weight, activations), require_int8_gpu(target), library=TRITON
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        """Register the operations; nothing is kept."""
        importlib.import_module("mezzotint.kernels.ops.rotate_quantize.op")
        importlib.import_module("mezzotint.kernels.ops.unpack_int8.op")
        return {}

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        x2d = apply_pre_quant_scale(x.reshape(-1, weight.shape[1]), weight.parts)
        quantized = quantize_activation(x2d, weight.parts.get("rotation"), input_scale(weight))
        y = int8_gemm(*quantized, *int8_weight(weight), bias, x.dtype)
        return y.reshape(*x.shape[:-1], weight.shape[0])


def int8_requirements(weight: WeightSpec, activations: str) -> Iterator[str | None]:
    """Yield reasons why a weight cannot be multiplied as INT8 on any device."""
    yield require_scheme(weight, *SCHEMES)
    yield require_known_parts(weight, OPTIONAL_PARTS)
    yield require_quantized_activation(weight, activations, "INT8")
    yield require_multiple_of(weight, GEMM_ALIGNMENT, GEMM_ALIGNMENT)
    yield _require_rotation(weight)


def _require_rotation(weight: WeightSpec) -> str | None:
    group = len_of_rotation(weight)
    if group is None or group in ROTATIONS:
        return None
    return f"rotates groups of {ROTATIONS[0]} to {ROTATIONS[-1]} columns, this layer has {group}"


def len_of_rotation(weight: WeightSpec) -> int | None:
    """Return the columns that a weight rotates together, or None."""
    return weight.parts["rotation"][0] if "rotation" in weight.parts else None


def input_scale(weight: QuantTensor) -> Tensor | None:
    """Return the static scale of an INT8 input, float32; None if the scale is per row."""
    scale = weight.parts.get("input_scale")
    if scale is None or weight.scheme.input_max == INT8_MAX:
        return scale
    # A scheme with 4-bit inputs has amax / 7; the GEMM keeps 8 bits of them.
    assert weight.scheme.input_max is not None  # noqa: S101
    return scale * (weight.scheme.input_max / INT8_MAX)


def int8_weight(weight: QuantTensor) -> tuple[Tensor, Tensor]:
    """Return the codes of an INT8 weight, int8 [out, in], and its scale, float32 [1] or [out]."""
    parts = weight.parts
    if weight.scheme is INT8:
        return parts["codes"], parts["weight_scale"].reshape(-1)
    codes: Tensor = torch.ops.mezzotint.unpack_int8(
        parts["codes"], parts.get("block_scale"), parts.get("codebook")
    )
    return codes, parts["channel_scale" if weight.scheme is W4A8 else "weight_scale"].reshape(-1)


BACKEND = INT8MM()
