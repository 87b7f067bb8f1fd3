"""Any weight, decoded to the input's dtype just before an ordinary matrix product (W8A16, W4A16).

For GPUs whose tensor cores do not know the weight's format. The input is not rounded.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.kernels.branches import around
from mezzotint.kernels.refusals import answer, other_gpu
from mezzotint.tensor import PLAIN, QuantTensor


class WeightOnly:
    name = "weight_only"
    preference = 5
    wants = PLAIN

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return answer(other_gpu(target, "BF16 tensor cores (sm_80 or newer)", lambda own: own >= (8, 0)))

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        return {}

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        return around(x, weight, bias, lambda z, b: F.linear(z, weight.scheme.decode(weight.parts).to(z.dtype), b))


BACKEND = WeightOnly()
