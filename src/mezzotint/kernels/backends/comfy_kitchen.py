"""NVFP4 GEMM by comfy-kitchen, which quantizes the activation and calls cuBLASLt.

Output and low-rank branch are BF16. For FP8, comfy-kitchen calls the same PyTorch function as the
scaled_mm backend. Source: https://github.com/Comfy-Org/comfy-kitchen
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.epilogue import apply_epilogue
from mezzotint.kernels.nvfp4_gemm import (
    BLOCKED_SCALES,
    SCHEMES,
    activation_global_scale,
    nvfp4_requirements,
    split_outer_scale,
)
from mezzotint.kernels.optional_library import OptionalLibrary
from mezzotint.kernels.requirements import check_requirements
from mezzotint.kernels.target import Target
from mezzotint.tensor import QuantTensor

LIBRARY = OptionalLibrary("comfy-kitchen", "comfy_kitchen", "0.2.40", "pip install comfy-kitchen")
OUT_MULTIPLE, IN_MULTIPLE = 8, 32


class ComfyKitchen:
    name = "comfy_kitchen"
    priority = 30
    weight_layout = BLOCKED_SCALES
    schemes = SCHEMES

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return check_requirements(
            *nvfp4_requirements(weight, target, activations, OUT_MULTIPLE, IN_MULTIPLE),
            libraries=(LIBRARY,),
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        return split_outer_scale(weight)

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        import comfy_kitchen

        def gemm(z: Tensor, gemm_bias: Tensor | None) -> Tensor:
            global_scale = activation_global_scale(z, weight)
            # hi_first=False: BLOCKED_SCALES has the low nibble first, and both operands must agree.
            codes, scale = comfy_kitchen.quantize_nvfp4(
                z.contiguous(), global_scale, pad_16x=True, hi_first=False
            )
            y: Tensor = comfy_kitchen.scaled_mm_nvfp4(
                codes,
                weight.parts["codes"],
                global_scale,
                weight.prepared["alpha"],
                scale,
                weight.parts["block_scale"],
                bias=gemm_bias,
                out_dtype=torch.bfloat16,
            )
            return y[: len(z)]  # pad_16x adds rows up to a multiple of 16

        return apply_epilogue(x.bfloat16(), weight, bias, gemm).to(x.dtype)


BACKEND = ComfyKitchen()
