"""All schemes in plain PyTorch, on any device. Faster backends are tested against this one.

The weight is decoded to float32 on each call. The activation is quantized as the checkpoint
specifies. The GEMM is in float32.
"""

from collections.abc import Mapping

from torch import Tensor

from mezzotint.kernels.backend import QUANTIZED_ACTIVATIONS, Can, Cannot, WeightSpec
from mezzotint.kernels.target import Target
from mezzotint.tensor import PLAIN, QuantTensor


class Reference:
    name = "reference"
    priority = 0
    weight_layout = PLAIN

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return Can()

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        return {}

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        quantize = activations == QUANTIZED_ACTIVATIONS and weight.quantizes_activation
        y = weight.scheme.linear(x, weight.parts, quantize=quantize)
        return (y if bias is None else y + bias.float()).to(x.dtype)


BACKEND = Reference()
