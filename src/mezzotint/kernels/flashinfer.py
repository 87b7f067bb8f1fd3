"""NVFP4 times NVFP4 by FlashInfer; with a low-rank branch, in the one kernel that it has for SVDQuant.

FlashInfer rounds the input. The product, the low-rank branch and the output are in BF16. Its functions cannot be traced
by torch.compile, so each is an operator here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.kernels.branches import around
from mezzotint.kernels.libraries import Library
from mezzotint.kernels.nvfp4_product import SCHEMES, TILED, input_unit, outer_scale, reasons_against
from mezzotint.kernels.refusals import answer, not_among
from mezzotint.layouts.arrangements import pad
from mezzotint.schemes import SVDQUANT_NVFP4
from mezzotint.tensor import QuantTensor

LIBRARY = Library("flashinfer-python", "flashinfer", "0.7.2", "pip install flashinfer-python")
GPUS = ((10, 0), (10, 3), (12, 0), (12, 1))
ROWS, COLUMNS = 32, 32
RANKS = 32
"""The kernel for SVDQuant takes ranks that are multiples of this; others are filled up with zeros."""


class FlashInfer:
    name = "flashinfer"
    preference = 35
    wants = TILED
    schemes = SCHEMES

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return answer(
            *reasons_against(weight, target, activations, ROWS, COLUMNS),
            not_among(target, GPUS, "FlashInfer has NVFP4 kernels for"),
            library=LIBRARY,
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        outer = outer_scale(weight)
        return outer | fused_branch(weight, outer["alpha"]) if "row_factor" not in outer else outer

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        if "up" in weight.prepared:
            return _with_branch(x, weight, bias)

        def product(z: Tensor, own_bias: Tensor | None) -> Tensor:
            unit = input_unit(z, weight)
            y: Tensor = nvfp4(z, weight.parts["codes"], weight.parts["block_scale"], unit, weight.prepared["alpha"])
            return y if own_bias is None else y + own_bias

        return around(x.bfloat16(), weight, bias, product).to(x.dtype)


def fused_branch(weight: QuantTensor, alpha: Tensor) -> dict[str, Tensor]:
    """What the kernel for SVDQuant takes, or nothing for a layer that it cannot run.

    The kernel computes scale * (Q(x * smoothing) R^T + (x down) up^T), scale being that of the codes and the input.

    Returns   smoothing, BF16 [in]; down, BF16 [in, rank]; up, BF16 [out, rank]; unit and scale, float32 []
    """
    parts = weight.parts
    branch = next((name for name in ("lora", "proj") if f"{name}_down" in parts), None)
    static = weight.scheme is SVDQUANT_NVFP4 or "input_scale" in parts
    if branch is None or not static or "shift" in parts:
        return {}
    unit = input_unit(parts["codes"], weight)
    smoothing = torch.ones(weight.shape[1], dtype=torch.float32, device=unit.device)
    if "pre_quant_scale" in parts:
        smoothing = smoothing * parts["pre_quant_scale"].float()
    if "smooth" in parts:
        smoothing = smoothing / parts["smooth"].float()
    down = parts[f"{branch}_down"].float() * (smoothing if branch == "lora" else 1)
    up = parts[f"{branch}_up"].float() / (alpha * unit)
    return {
        "smoothing": smoothing.bfloat16(),
        "down": pad(down.t().bfloat16(), (1, RANKS), 0),
        "up": pad(up.bfloat16(), (1, RANKS), 0),
        "unit": unit,
        "scale": alpha * unit,
    }


def _with_branch(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    parts, ready = weight.parts, weight.prepared
    y: Tensor = svdquant(
        x.reshape(-1, weight.shape[1]).bfloat16(),
        parts["codes"],
        parts["block_scale"],
        ready["scale"],
        ready["smoothing"],
        ready["down"],
        ready["up"],
        ready["unit"],
        None if bias is None else bias.bfloat16(),
    )
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("mezzotint::flashinfer_nvfp4", mutates_args=())
def nvfp4(z: Tensor, codes: Tensor, block_scale: Tensor, unit: Tensor, alpha: Tensor) -> Tensor:
    """z, BF16 [rows, in], rounded in units of `unit`, times the codes: BF16 [rows, out]."""
    import flashinfer

    rounded, scale = flashinfer.nvfp4_quantize(z.contiguous(), 1 / unit.reshape(1))
    y: Tensor = flashinfer.mm_fp4(
        rounded,
        codes.t(),
        scale,
        block_scale.view(torch.uint8).t(),
        (alpha * unit).reshape(1),
        out_dtype=torch.bfloat16,
    )
    return y


@torch.library.custom_op("mezzotint::flashinfer_svdquant", mutates_args=())
def svdquant(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    scale: Tensor,
    smoothing: Tensor,
    down: Tensor,
    up: Tensor,
    unit: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The layer of `fused_branch` and its bias: x, BF16 [rows, in], to BF16 [rows, out]."""
    import flashinfer

    y: Tensor = flashinfer.svdquant_linear(
        x.contiguous(),
        codes,
        block_scale.view(torch.uint8),
        scale.reshape(1),
        smoothing,
        down,
        up,
        1 / unit.reshape(1),
        bias=bias,
    )
    return y


@nvfp4.register_fake
def _(z: Tensor, codes: Tensor, block_scale: Tensor, unit: Tensor, alpha: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], codes.shape[0])


@svdquant.register_fake
def _(x: Tensor, codes: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


BACKEND = FlashInfer()
