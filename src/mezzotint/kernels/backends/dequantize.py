"""Dequantize a weight to the activation's dtype in one kernel, before an ordinary GEMM.

The weight stays packed in memory, and its dequantized matrix is freed after each GEMM. The numbers
are those of `weight_only`. GEMMs with few input rows read the dequantized matrix too: they would
be faster with a kernel that reads the packed weight only.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.dequantize import (
    SCHEMES,
    dequantize,
    prepare_codebook,
    require_even_runs,
    require_multiplied_scale,
)
from mezzotint.kernels.epilogue import apply_epilogue
from mezzotint.kernels.requirements import (
    TRITON,
    check_requirements,
    require_bf16_gpu,
    require_scheme,
)
from mezzotint.kernels.target import Target
from mezzotint.tensor import PLAIN, QuantTensor


class Dequantize:
    name = "dequantize"
    priority = 6
    weight_layout = PLAIN
    schemes = SCHEMES

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        scheme = require_scheme(weight, *SCHEMES)
        return check_requirements(
            scheme,
            require_bf16_gpu(target),
            None if scheme else require_even_runs(weight),
            require_multiplied_scale(weight),
            libraries=(TRITON,),
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        return prepare_codebook(weight)

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        def gemm(z: Tensor, gemm_bias: Tensor | None) -> Tensor:
            return F.linear(z, dequantize(weight, z.dtype), gemm_bias)

        return apply_epilogue(x, weight, bias, gemm)


BACKEND = Dequantize()
