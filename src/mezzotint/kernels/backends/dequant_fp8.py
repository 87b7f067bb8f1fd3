"""Dequantize 4-bit weights to FP8 just before each GEMM. In memory they stay in 4 bits.

Used on GPUs with FP8 but no FP4 tensor cores (Ada, Hopper), and for SVDQuant on all GPUs. Codes,
scales, low-rank branch and smoothing are merged into one FP8 matrix, see
`mezzotint.kernels.ops.dequant_fp8.reference`. So the low-rank branch needs no second GEMM, and
activations are quantized to FP8 instead of 4 bits.
"""

import importlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.fp8_gemm import (
    GEMM_ALIGNMENT,
    GEMV_MAX_ROWS,
    apply_pre_quant_scale,
    fp8_linear,
)
from mezzotint.kernels.fp8_weight import bias_with_shift, fp8_input_scale, get_fp8_weight
from mezzotint.kernels.ops.code_kinds import code_kind
from mezzotint.kernels.ops.dequant_fp8.reference import (
    has_static_input,
    low_rank_factors,
    prepare_scales,
)
from mezzotint.kernels.requirements import (
    TRITON,
    check_requirements,
    require_fp8_gpu,
    require_multiple_of,
    require_quantized_activation,
    require_scheme,
)
from mezzotint.kernels.target import Target
from mezzotint.schemes import NVFP4, SVDQUANT_INT4, SVDQUANT_NVFP4
from mezzotint.tensor import PLAIN, QuantTensor

SCHEMES = (NVFP4, SVDQUANT_INT4, SVDQUANT_NVFP4)


class DequantFP8:
    name = "dequant_fp8"
    priority = 20
    weight_layout = PLAIN
    schemes = SCHEMES

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return check_requirements(
            *fp8_requirements(weight, activations), require_fp8_gpu(target), libraries=(TRITON,)
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        """Register the operations; return what `prepare_scales` returns."""
        importlib.import_module("mezzotint.kernels.ops.dequant_fp8.op")
        importlib.import_module("mezzotint.kernels.ops.gemv.op")
        return prepare_scales(weight)

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        x2d = x.reshape(-1, weight.shape[1])
        if has_static_input(weight.parts):
            x2d = apply_pre_quant_scale(x2d, weight.parts)
        # Few rows are bound by reading the weight, so they read its 4 bits directly. The low-rank
        # branch would need a GEMM of its own there.
        if x2d.shape[0] <= GEMV_MAX_ROWS and low_rank_factors(weight.parts) is None:
            y = gemv_linear(x2d, weight, bias_with_shift(weight, bias))
        else:
            fp8 = get_fp8_weight(weight, bias)
            y = fp8_linear(x2d, fp8.codes, fp8.weight_scale, fp8.bias, fp8_input_scale(weight))
        return y.reshape(*x.shape[:-1], weight.shape[0])


def fp8_requirements(weight: WeightSpec, activations: str) -> Iterator[str | None]:
    """Yield reasons why a weight has no equivalent FP8 form on any device."""
    yield require_scheme(weight, *SCHEMES)
    yield require_quantized_activation(weight, activations, "FP8")
    if has_static_input(weight.parts) and "proj_down" in weight.parts:
        # The matrix multiplies the smoothed input, and this branch reads the original one.
        yield "cannot apply a low-rank branch on the layer's own input with a static input scale"
    yield require_multiple_of(weight, GEMM_ALIGNMENT, max(GEMM_ALIGNMENT, weight.scheme.group))


def can_dequant_fp8(weight: WeightSpec, activations: str) -> Can | Cannot:
    """Return whether a weight has an equivalent FP8 form."""
    return check_requirements(*fp8_requirements(weight, activations))


def gemv_linear(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    """Multiply unquantized x [rows, in] by the 4-bit matrix; return [rows, out] in x's dtype."""
    parts, prepared = weight.parts, weight.prepared
    y: Tensor = torch.ops.mezzotint.gemv4(
        (x * prepared["column"].to(x.dtype) if "column" in prepared else x).contiguous(),
        parts["codes"],
        parts["block_scale"],
        None,
        prepared["factor"] * prepared["scale"],
        code_kind(weight.scheme),
        weight.scheme.group,
    )
    return (y if bias is None else y + bias.float()).to(x.dtype)


BACKEND = DequantFP8()
