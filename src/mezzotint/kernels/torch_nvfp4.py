"""NVFP4 times NVFP4 on Blackwell's tensor cores, through PyTorch's scaled matrix product (cuBLASLt).

The input is rounded in ordinary PyTorch operations, as the scheme says it, so that torch.compile may fuse that into
whatever produced it. The product, the low-rank branch and the output are in BF16.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType, SwizzleType

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.kernels.branches import around
from mezzotint.kernels.nvfp4_product import SCHEMES, TILED, input_unit, outer_scale, reasons_against
from mezzotint.kernels.refusals import answer
from mezzotint.layouts import to_tiles
from mezzotint.schemes import SVDQUANT_NVFP4
from mezzotint.schemes.nvfp4 import round_nvfp4
from mezzotint.schemes.rounding import pack_e2m1
from mezzotint.schemes.svdquant_nvfp4 import round_svdquant_nvfp4
from mezzotint.tensor import QuantTensor

RECIPE = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
SWIZZLE = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
ROWS, COLUMNS = 16, 32


class TorchNVFP4:
    name = "torch_nvfp4"
    preference = 40
    wants = TILED
    schemes = SCHEMES

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return answer(*reasons_against(weight, target, activations, ROWS, COLUMNS))

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        return outer_scale(weight)

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        def product(z: Tensor, own_bias: Tensor | None) -> Tensor:
            codes, scale, unit = rounded_input(z, weight)
            return F.scaled_mm(
                codes.view(torch.float4_e2m1fn_x2),
                weight.parts["codes"].view(torch.float4_e2m1fn_x2).t(),
                scale_a=[scale.flatten(), unit],
                scale_recipe_a=RECIPE,
                swizzle_a=SWIZZLE,
                scale_b=[weight.parts["block_scale"].flatten(), weight.prepared["alpha"]],
                scale_recipe_b=RECIPE,
                swizzle_b=SWIZZLE,
                bias=own_bias,
                output_dtype=torch.bfloat16,
            )

        return around(x.bfloat16(), weight, bias, product).to(x.dtype)


def rounded_input(z: Tensor, weight: QuantTensor) -> tuple[Tensor, Tensor, Tensor]:
    """z [rows, in] as NVFP4: codes uint8 [rows, in/2], block scales e4m3 in tiles, and their unit, float32 []."""
    unit = input_unit(z, weight)
    by_block = weight.scheme is SVDQUANT_NVFP4
    values, scale = round_svdquant_nvfp4(z) if by_block else round_nvfp4(z, unit)
    return pack_e2m1(values), to_tiles(scale), unit


BACKEND = TorchNVFP4()
