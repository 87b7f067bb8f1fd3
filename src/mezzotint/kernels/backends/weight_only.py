"""Dequantize any weight to the activation's dtype before an ordinary GEMM (W8A16, W4A16).

For GPUs whose tensor cores do not support the weight's format. Activations are not quantized.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.epilogue import apply_epilogue
from mezzotint.kernels.requirements import check_requirements, require_bf16_gpu
from mezzotint.kernels.target import Target
from mezzotint.tensor import PLAIN, QuantTensor


class WeightOnly:
    name = "weight_only"
    priority = 5
    weight_layout = PLAIN

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return check_requirements(require_bf16_gpu(target))

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        return {}

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        def gemm(z: Tensor, gemm_bias: Tensor | None) -> Tensor:
            return F.linear(z, weight.scheme.decode(weight.parts).to(z.dtype), gemm_bias)

        return apply_epilogue(x, weight, bias, gemm)


BACKEND = WeightOnly()
