"""FP8 GEMM on tensor cores, by PyTorch's scaled_mm (cuBLASLt)."""

from collections.abc import Mapping

from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.fp8_gemm import GEMM_ALIGNMENT, apply_pre_quant_scale, fp8_linear
from mezzotint.kernels.requirements import (
    check_requirements,
    require_fp8_gpu,
    require_known_parts,
    require_multiple_of,
    require_quantized_activation,
    require_scheme,
)
from mezzotint.kernels.target import Target
from mezzotint.schemes import FP8
from mezzotint.tensor import PLAIN, QuantTensor


class ScaledMM:
    name = "scaled_mm"
    priority = 10
    weight_layout = PLAIN
    schemes = (FP8,)

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return check_requirements(
            require_scheme(weight, FP8),
            require_fp8_gpu(target),
            require_known_parts(weight, {"input_scale", "pre_quant_scale"}),
            require_quantized_activation(weight, activations, "FP8"),
            require_multiple_of(weight, GEMM_ALIGNMENT, GEMM_ALIGNMENT),
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        return {}

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        out_features, in_features = weight.shape
        parts = weight.parts
        # pre_quant_scale cannot be merged into FP8 codes without rounding them again.
        x2d = apply_pre_quant_scale(x.reshape(-1, in_features), parts)
        y = fp8_linear(x2d, parts["codes"], parts["weight_scale"], bias, parts.get("input_scale"))
        return y.reshape(*x.shape[:-1], out_features)


BACKEND = ScaledMM()
