"""NVFP4 times NVFP4 by comfy-kitchen: its kernel rounds the input, cuBLASLt multiplies.

The product, the low-rank branch and the output are in BF16. comfy-kitchen's FP8 product is PyTorch's own, which the
backend scaled_mm calls too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.kernels.branches import around
from mezzotint.kernels.libraries import Library
from mezzotint.kernels.nvfp4_product import SCHEMES, TILED, input_unit, outer_scale, reasons_against
from mezzotint.kernels.refusals import answer
from mezzotint.tensor import QuantTensor

LIBRARY = Library("comfy-kitchen", "comfy_kitchen", "0.2.40", "pip install comfy-kitchen")
ROWS, COLUMNS = 8, 32


class ComfyKitchen:
    name = "comfy_kitchen"
    preference = 30
    wants = TILED
    schemes = SCHEMES

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return answer(*reasons_against(weight, target, activations, ROWS, COLUMNS), library=LIBRARY)

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        return outer_scale(weight)

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        import comfy_kitchen

        def product(z: Tensor, own_bias: Tensor | None) -> Tensor:
            unit = input_unit(z, weight)
            codes, scale = comfy_kitchen.quantize_nvfp4(z.contiguous(), unit, pad_16x=True, hi_first=False)
            y: Tensor = comfy_kitchen.scaled_mm_nvfp4(
                codes,
                weight.parts["codes"],
                unit,
                weight.prepared["alpha"],
                scale,
                weight.parts["block_scale"],
                bias=own_bias,
                out_dtype=torch.bfloat16,
            )
            return y[: len(z)]

        return around(x.bfloat16(), weight, bias, product).to(x.dtype)


BACKEND = ComfyKitchen()
