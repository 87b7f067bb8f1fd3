"""INT8 GEMM on tensor cores, for INT8 weights and for 4-bit weights that stand for integers.

4-bit weights stay in 4 bits in memory. They are unpacked to INT8 just before each GEMM.
"""

import importlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mezzotint.errors import Unsupported
from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.fp8_gemm import apply_pre_quant_scale
from mezzotint.kernels.int8_gemm import GEMM_ALIGNMENT, int8_gemm, quantize_activation
from mezzotint.kernels.int8_weight import SCHEMES, get_int8_weight, static_int8_scale
from mezzotint.kernels.requirements import (
    NVRTC_LIBRARY,
    TRITON,
    check_requirements,
    require_int8_gpu,
    require_known_parts,
    require_multiple_of,
    require_quantized_activation,
    require_scheme,
)
from mezzotint.kernels.target import Target
from mezzotint.schemes.rotation import regular_hadamard, sylvester_hadamard
from mezzotint.tensor import PLAIN, QuantTensor

OPTIONAL_PARTS = {"input_scale", "pre_quant_scale", "rotation", "codebook"}
ROTATIONS = (16, 64, 256)
"""Groups of columns that the kernel rotates together."""


class INT8MM:
    name = "int8_mm"
    priority = 10
    weight_layout = PLAIN
    schemes = SCHEMES

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return check_requirements(
            *int8_requirements(weight, activations),
            require_int8_gpu(target),
            libraries=(NVRTC_LIBRARY, TRITON) if "rotation" in weight.parts else (TRITON,),
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        """Register the operations. Raise Unsupported for a rotation that is no Hadamard matrix."""
        importlib.import_module("mezzotint.kernels.ops.quantize_int8.op")
        importlib.import_module("mezzotint.kernels.ops.unpack_int8.op")
        if "rotation" in weight.parts:
            _check_rotation(weight.parts["rotation"])
        return {}

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        x2d = apply_pre_quant_scale(x.reshape(-1, weight.shape[1]), weight.parts)
        rotation = weight.parts.get("rotation")
        quantized = quantize_activation(x2d, rotation, static_int8_scale(weight))
        y = int8_gemm(*quantized, *get_int8_weight(weight), bias, x.dtype)
        return y.reshape(*x.shape[:-1], weight.shape[0])


def int8_requirements(weight: WeightSpec, activations: str) -> Iterator[str | None]:
    """Yield reasons why a weight cannot be multiplied as INT8 on any device."""
    yield require_scheme(weight, *SCHEMES)
    yield require_known_parts(weight, OPTIONAL_PARTS)
    yield require_quantized_activation(weight, activations, "INT8")
    yield require_multiple_of(weight, GEMM_ALIGNMENT, GEMM_ALIGNMENT)
    yield _require_rotation(weight)


def _require_rotation(weight: WeightSpec) -> str | None:
    if "rotation" not in weight.parts:
        return None
    group = weight.parts["rotation"][0]
    if group in ROTATIONS:
        return None
    return f"rotates groups of 16, 64 or 256 columns, this layer has {group}"


def _check_rotation(signs: Tensor) -> None:
    """Raise Unsupported if the kernel does not know a matrix, which it tells by one sign."""
    known = (regular_hadamard(len(signs)), sylvester_hadamard(len(signs)))
    if not any(torch.equal(signs, matrix.to(signs.device)) for matrix in known):
        raise Unsupported(
            "a layer's rotation is not a regular or Sylvester Hadamard matrix",
            "--backend weight_only multiplies by any matrix.",
        )


BACKEND = INT8MM()
