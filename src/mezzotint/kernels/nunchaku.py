"""SVDQuant layers by Nunchaku's own kernels: 4-bit codes times 4-bit inputs, the low-rank branch and the bias in one.

Nunchaku's kernels read the order of bytes that its files are in. The output is in BF16. Its functions cannot be traced
by torch.compile, so they are one operator here. What PyPI calls nunchaku is another project.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.kernels.libraries import Library
from mezzotint.kernels.refusals import (
    absent_parts,
    answer,
    exact_input,
    not_among,
    odd_sides,
    other_parts,
    other_scheme,
)
from mezzotint.layouts.nunchaku import WARP, to_vector_fragments
from mezzotint.schemes import Scheme
from mezzotint.tensor import Layout, QuantTensor

LIBRARY = Library(
    "nunchaku",
    "nunchaku",
    "1.0",
    "its wheels are at https://github.com/nunchaku-ai/nunchaku/releases, not on PyPI",
    holds="ops",
)
NEEDED = ("smooth", "proj_down", "proj_up")
APPLIED = (*NEEDED, "global_scale", "channel_scale", "bias")


@dataclass(frozen=True)
class Nunchaku:
    """Nunchaku for one scheme.

    gpus     the compute capabilities that it has kernels for
    inputs   what its kernels round the input to
    """

    name: str
    scheme: Scheme
    gpus: Collection[tuple[int, int]]
    inputs: str
    wants: Layout
    preference: int = 50

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        return (self.scheme,)

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return answer(
            other_scheme(weight, self.scheme),
            not_among(target, self.gpus, f"Nunchaku has {self.inputs} kernels for"),
            exact_input(weight, activations, self.inputs),
            absent_parts(weight, NEEDED),
            other_parts(weight, APPLIED),
            odd_sides(weight, WARP, WARP),
            library=LIBRARY,
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        """row_scale, BF16 [out] in Nunchaku's order: what multiplies rows besides their blocks' scales, if there is."""
        scales = [weight.parts[name].float() for name in ("global_scale", "channel_scale") if name in weight.parts]
        if not scales:
            return {}
        whole = torch.stack([scale.expand(weight.shape[0]) for scale in scales]).prod(dim=0)
        return {"row_scale": whole.bfloat16()}

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        parts = weight.parts
        y: Tensor = w4a4(
            x.reshape(-1, weight.shape[1]).bfloat16(),
            parts["codes"],
            parts["block_scale"],
            parts["smooth"],
            parts["proj_down"],
            parts["proj_up"],
            weight.prepared.get("row_scale"),
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
    """A whole layer, x BF16 [rows, in] to BF16 [rows, out]; everything but x is in Nunchaku's order."""
    from nunchaku.ops.gemm import svdq_gemm_w4a4_cuda
    from nunchaku.ops.quantize import svdq_quantize_w4a4_act_fuse_lora_cuda

    fp4 = block_scale.dtype == torch.float8_e4m3fn
    rounded, scales, down = svdq_quantize_w4a4_act_fuse_lora_cuda(
        x.contiguous(), lora_down=proj_down.to(x.dtype), smooth=smooth.to(x.dtype), fp4=fp4
    )
    y = x.new_empty(x.shape[0], codes.shape[0])
    svdq_gemm_w4a4_cuda(
        act=rounded,
        wgt=codes,
        out=y,
        ascales=scales,
        wscales=block_scale if fp4 else block_scale.to(x.dtype),
        lora_act_in=down,
        lora_up=proj_up.to(x.dtype),
        bias=None if bias is None else bias.to(x.dtype),
        fp4=fp4,
        wcscales=row_scale,
    )
    return y


@w4a4.register_fake
def _(x: Tensor, codes: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])
