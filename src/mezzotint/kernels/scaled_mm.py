"""FP8 times FP8 on the GPU's tensor cores, through PyTorch's scaled matrix product (cuBLASLt)."""

from collections.abc import Mapping

from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.kernels.products import MULTIPLE, fp8_product, scaled_input
from mezzotint.kernels.refusals import answer, exact_input, odd_sides, other_gpu, other_parts, other_scheme
from mezzotint.schemes import FP8
from mezzotint.tensor import PLAIN, QuantTensor


class ScaledMM:
    name = "scaled_mm"
    preference = 10
    wants = PLAIN
    schemes = (FP8,)

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return answer(
            other_scheme(weight, FP8),
            other_gpu(target, "FP8 tensor cores (sm_89 or newer)", lambda own: own >= (8, 9)),
            other_parts(weight, {"input_scale", "pre_quant_scale"}),
            exact_input(weight, activations, "FP8"),
            odd_sides(weight, MULTIPLE, MULTIPLE),
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        return {}

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        out_features, in_features = weight.shape
        parts = weight.parts
        rows = scaled_input(x.reshape(-1, in_features), parts)
        product = fp8_product(rows, parts["codes"], parts["weight_scale"], bias, parts.get("input_scale"))
        return product.reshape(*x.shape[:-1], out_features)


BACKEND = ScaledMM()
