"""NVFP4 GEMM on Blackwell tensor cores, by PyTorch's scaled_mm (cuBLASLt).

The activation is quantized in ordinary PyTorch operations, so that torch.compile can fuse them into
its producer. Output and low-rank branch are BF16.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType, SwizzleType

from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.epilogue import apply_epilogue
from mezzotint.kernels.nvfp4_gemm import (
    BLOCKED_SCALES,
    SCHEMES,
    activation_global_scale,
    nvfp4_requirements,
    split_outer_scale,
)
from mezzotint.kernels.requirements import check_requirements
from mezzotint.kernels.target import Target
from mezzotint.layouts import to_tiles
from mezzotint.schemes import SVDQUANT_NVFP4
from mezzotint.schemes.minifloats import pack_e2m1
from mezzotint.schemes.nvfp4 import quantize_nvfp4
from mezzotint.schemes.svdquant_nvfp4 import quantize_svdquant_nvfp4
from mezzotint.tensor import QuantTensor

# One scale per 16 numbers in 128x4 tiles (32x4x4 is the tile's inner order), and a global scale.
RECIPE = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
SWIZZLE = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
OUT_MULTIPLE, IN_MULTIPLE = 16, 32


class TorchNVFP4:
    name = "torch_nvfp4"
    priority = 40
    weight_layout = BLOCKED_SCALES
    schemes = SCHEMES

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return check_requirements(
            *nvfp4_requirements(weight, target, activations, OUT_MULTIPLE, IN_MULTIPLE)
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        return split_outer_scale(weight)

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        def gemm(z: Tensor, gemm_bias: Tensor | None) -> Tensor:
            codes, scale, global_scale = quantize_activation_nvfp4(z, weight)
            return F.scaled_mm(
                # A byte holds two numbers, which is how PyTorch defines this dtype.
                codes.view(torch.float4_e2m1fn_x2),
                weight.parts["codes"].view(torch.float4_e2m1fn_x2).t(),
                scale_a=[scale.flatten(), global_scale],
                scale_recipe_a=RECIPE,
                swizzle_a=SWIZZLE,
                scale_b=[weight.parts["block_scale"].flatten(), weight.prepared["alpha"]],
                scale_recipe_b=RECIPE,
                swizzle_b=SWIZZLE,
                bias=gemm_bias,
                output_dtype=torch.bfloat16,
            )

        return apply_epilogue(x.bfloat16(), weight, bias, gemm).to(x.dtype)


def quantize_activation_nvfp4(z: Tensor, weight: QuantTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize z [rows, in] to NVFP4.

    Returns   codes uint8 [rows, in/2]; block scales e4m3 in 128x4 tiles; global scale float32 []
    """
    global_scale = activation_global_scale(z, weight)
    values, scale = (
        quantize_svdquant_nvfp4(z)
        if weight.scheme is SVDQUANT_NVFP4
        else quantize_nvfp4(z, global_scale)
    )
    return pack_e2m1(values), to_tiles(scale), global_scale


BACKEND = TorchNVFP4()
