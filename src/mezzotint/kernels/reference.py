"""Every scheme in plain PyTorch, on any device: the numerical truth that faster kernels are held against.

The weight is decoded to float32 at each call, the input is rounded as the checkpoint says, and the product is in
float32.
"""

from torch import Tensor
from torch.nn import functional as F

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.tensor import PLAIN, QuantTensor


class Reference:
    name = "reference"
    preference = 0
    wants = PLAIN

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return Can()

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        scheme = weight.scheme
        real_x = x.float()
        if scheme.quantize_input and WeightSpec.of(weight).quantizes_input(activations):
            real_x = scheme.quantize_input(real_x, weight.parts)
        real_bias = None if bias is None else bias.float()
        return F.linear(real_x, scheme.dequantize(weight.parts), real_bias).to(x.dtype)


BACKEND = Reference()
