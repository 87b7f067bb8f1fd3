"""Every scheme in plain PyTorch, on any device: the numerical truth that faster kernels are held against.

The weight is decoded to float32 at each call, the input is rounded as the checkpoint says, and the product is in
float32.
"""

from collections.abc import Mapping

from torch import Tensor

from mezzotint.kernels.backend import AS_STORED, Can, Cannot, Target, WeightSpec
from mezzotint.tensor import PLAIN, QuantTensor


class Reference:
    name = "reference"
    preference = 0
    wants = PLAIN

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return Can()

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        return {}

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        product = weight.scheme.linear(x, weight.parts, quantize=activations == AS_STORED and weight.quantizes_input)
        return (product if bias is None else product + bias.float()).to(x.dtype)


BACKEND = Reference()
