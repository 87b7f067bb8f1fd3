"""SVDQuant layers by Nunchaku's kernels: W4A4 GEMM with fused low-rank branch and bias.

The kernels read the byte order of Nunchaku's files. Output is BF16. torch.compile cannot trace
them, so they are wrapped in one custom operator. The package called nunchaku on PyPI is another
project.

SVDQuant: https://arxiv.org/abs/2411.05007
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.optional_library import OptionalLibrary
from mezzotint.kernels.requirements import (
    check_requirements,
    require_gpu_in,
    require_known_parts,
    require_multiple_of,
    require_parts,
    require_quantized_activation,
    require_scheme,
)
from mezzotint.kernels.target import Target
from mezzotint.layouts.nunchaku import WARP, to_vector_fragments
from mezzotint.schemes import Scheme
from mezzotint.tensor import Layout, QuantTensor

LIBRARY = OptionalLibrary(
    "nunchaku",
    "nunchaku",
    "1.0",
    "its wheels are at https://github.com/nunchaku-ai/nunchaku/releases, not on PyPI",
    expected_submodule="ops",
)
REQUIRED_PARTS = ("smooth", "proj_down", "proj_up")
SUPPORTED_PARTS = (*REQUIRED_PARTS, "global_scale", "channel_scale", "bias")


@dataclass(frozen=True)
class Nunchaku:
    """The backend of one scheme.

    gpus                supported compute capabilities
    activation_format   format that the kernels quantize activations to, for messages
    """

    name: str
    scheme: Scheme
    gpus: Collection[tuple[int, int]]
    activation_format: str
    weight_layout: Layout
    priority: int = 50

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        return (self.scheme,)

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return check_requirements(
            require_scheme(weight, self.scheme),
            require_gpu_in(target, self.gpus, f"Nunchaku has {self.activation_format} kernels for"),
            require_quantized_activation(weight, activations, self.activation_format),
            require_parts(weight, REQUIRED_PARTS),
            require_known_parts(weight, SUPPORTED_PARTS),
            require_multiple_of(weight, WARP, WARP),
            libraries=(LIBRARY,),
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        """Return row_scale, BF16 [out] in Nunchaku's order, if rows have a factor of their own.

        It is the product of the global scale and the channel scale.
        """
        scales = [
            weight.parts[name].float()
            for name in ("global_scale", "channel_scale")
            if name in weight.parts
        ]
        if not scales:
            return {}
        row_scale = torch.stack([scale.expand(weight.shape[0]) for scale in scales]).prod(dim=0)
        return {"row_scale": row_scale.bfloat16()}

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        parts = weight.parts
        y: Tensor = w4a4(
            x.reshape(-1, weight.shape[1]).bfloat16(),
            parts["codes"],
            parts["block_scale"],
            parts["smooth"],
            parts["proj_down"],
            parts["proj_up"],
            weight.prepared.get("row_scale"),
            # The bias of a QuantLinear is plain, in whatever layout the other parts are.
            None if bias is None else to_vector_fragments(bias.unsqueeze(1)).squeeze(0),
        )
        return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("mezzotint::nunchaku_w4a4", mutates_args=())
def w4a4(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    smooth: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Run a complete layer, x BF16 [rows, in] to BF16 [rows, out].

    All operands except x are in Nunchaku's order.
    """
    from nunchaku.ops.gemm import svdq_gemm_w4a4_cuda
    from nunchaku.ops.quantize import svdq_quantize_w4a4_act_fuse_lora_cuda

    # Only NVFP4 has e4m3 block scales; INT4's are 16-bit numbers in x's dtype.
    fp4 = block_scale.dtype == torch.float8_e4m3fn
    x_quantized, x_scales, down = svdq_quantize_w4a4_act_fuse_lora_cuda(
        x.contiguous(), lora_down=proj_down.to(x.dtype), smooth=smooth.to(x.dtype), fp4=fp4
    )
    y = x.new_empty(x.shape[0], codes.shape[0])
    svdq_gemm_w4a4_cuda(
        act=x_quantized,
        wgt=codes,
        out=y,
        ascales=x_scales,
        wscales=block_scale if fp4 else block_scale.to(x.dtype),
        lora_act_in=down,
        lora_up=proj_up.to(x.dtype),
        bias=None if bias is None else bias.to(x.dtype),
        fp4=fp4,
        wcscales=row_scale,  # the global scale is merged into it, so `alpha` stays 1
    )
    return y


@w4a4.register_fake
def _(x: Tensor, codes: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])
