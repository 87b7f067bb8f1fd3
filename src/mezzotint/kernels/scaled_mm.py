"""FP8 times FP8 on the GPU's tensor cores, through PyTorch's scaled matrix product (cuBLASLt)."""

from collections.abc import Mapping

from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.kernels.products import MULTIPLE, fp8_product, scaled_input
from mezzotint.schemes import FP8
from mezzotint.tensor import PLAIN, QuantTensor


class ScaledMM:
    name = "scaled_mm"
    preference = 10
    wants = PLAIN

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        if weight.scheme is not FP8:
            return Cannot(f"multiplies FP8 only, this is {weight.scheme.title}")
        if target.kind != "cuda" or target.capability is None:
            return Cannot(f"needs a CUDA GPU, this is {target}")
        if target.capability < (8, 9):
            return Cannot(f"needs FP8 tensor cores (sm_89 or newer), this is {target}")
        extra = set(weight.parts) - {"codes", "weight_scale", "input_scale", "pre_quant_scale"}
        if extra:
            return Cannot(f"has no way to apply {', '.join(sorted(extra))}")
        if not weight.quantizes_input(activations):
            return Cannot("multiplies FP8 by FP8, and the inputs of this layer are not quantized")
        if any(side % MULTIPLE for side in weight.shape):
            return Cannot(
                f"needs sides that are multiples of {MULTIPLE}, this is {weight.shape[0]} x {weight.shape[1]}"
            )
        return Can()

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        return {}

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        out_features, in_features = weight.shape
        parts = weight.parts
        rows = scaled_input(x.reshape(-1, in_features), parts)
        product = fp8_product(rows, parts["codes"], parts["weight_scale"], bias, parts.get("input_scale"))
        return product.reshape(*x.shape[:-1], out_features)


BACKEND = ScaledMM()
