"""NVFP4 GEMM by FlashInfer; with a low-rank branch, by its fused SVDQuant kernel.

FlashInfer quantizes the activation. Output and low-rank branch are BF16. torch.compile cannot trace
its functions, so each is wrapped in a custom operator. Source: https://docs.flashinfer.ai
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
from mezzotint.kernels.requirements import check_requirements, require_gpu_in
from mezzotint.kernels.target import Target
from mezzotint.layouts.part_layouts import pad
from mezzotint.schemes import SVDQUANT_NVFP4
from mezzotint.schemes.scheme import Parts
from mezzotint.tensor import QuantTensor

LIBRARY = OptionalLibrary(
    "flashinfer-python", "flashinfer", "0.7.2", "pip install flashinfer-python"
)
GPUS = ((10, 0), (10, 3), (12, 0), (12, 1))
OUT_MULTIPLE, IN_MULTIPLE = 32, 32
RANK_MULTIPLE = 32
"""The SVDQuant kernel requires ranks that are multiples of this; others are padded with zeros."""


class FlashInfer:
    name = "flashinfer"
    priority = 35
    weight_layout = BLOCKED_SCALES
    schemes = SCHEMES

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return check_requirements(
            *nvfp4_requirements(weight, target, activations, OUT_MULTIPLE, IN_MULTIPLE),
            require_gpu_in(target, GPUS, "FlashInfer has NVFP4 kernels for"),
            libraries=(LIBRARY,),
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        """Return the scales of the NVFP4 kernel, and the operands of the SVDQuant kernel if any."""
        outer = split_outer_scale(weight)
        if "row_factor" in outer:  # the SVDQuant kernel takes one scale for the matrix
            return outer
        return outer | svdquant_operands(weight, outer["alpha"])

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        if "up" in weight.prepared:
            return _svdquant_linear(x, weight, bias)

        def gemm(z: Tensor, gemm_bias: Tensor | None) -> Tensor:
            parts = weight.parts
            global_scale, alpha = activation_global_scale(z, weight), weight.prepared["alpha"]
            y: Tensor = nvfp4(z, parts["codes"], parts["block_scale"], global_scale, alpha)
            return y if gemm_bias is None else y + gemm_bias

        return apply_epilogue(x.bfloat16(), weight, bias, gemm).to(x.dtype)


def svdquant_operands(weight: QuantTensor, alpha: Tensor) -> dict[str, Tensor]:
    """Return the operands of the SVDQuant kernel, or nothing if it cannot run the layer.

    The kernel computes scale * (Q(x * smoothing) R^T + (x down) up^T), where scale combines those
    of the codes and of the input. So `up` is divided by it, and `down` takes over the smoothing
    where the branch reads the smoothed input.

    Returns   smoothing, BF16 [in]; down, BF16 [in, rank]; up, BF16 [out, rank];
              global_scale and scale, float32 []
    """
    parts = weight.parts
    # Only a static input scale can be merged into operands that are prepared before any input.
    branch = next((name for name in ("lora", "proj") if f"{name}_down" in parts), None)
    is_static = weight.scheme is SVDQUANT_NVFP4 or "input_scale" in parts
    if branch is None or not is_static or "shift" in parts:
        return {}
    global_scale = activation_global_scale(parts["codes"], weight)
    smoothing = _smoothing(parts, weight.shape[1], global_scale.device)
    down = parts[f"{branch}_down"].float() * (smoothing if branch == "lora" else 1)
    up = parts[f"{branch}_up"].float() / (alpha * global_scale)
    return {
        "smoothing": smoothing.bfloat16(),
        "down": pad(down.t().bfloat16(), (1, RANK_MULTIPLE), 0),
        "up": pad(up.bfloat16(), (1, RANK_MULTIPLE), 0),
        "global_scale": global_scale,
        "scale": alpha * global_scale,
    }


def _smoothing(parts: Parts, in_features: int, device: torch.device) -> Tensor:
    """Return what multiplies the input before it is quantized, float32 [in]."""
    smoothing = torch.ones(in_features, dtype=torch.float32, device=device)
    if "pre_quant_scale" in parts:
        smoothing = smoothing * parts["pre_quant_scale"].float()
    if "smooth" in parts:
        smoothing = smoothing / parts["smooth"].float()
    return smoothing


def _svdquant_linear(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    parts, prepared = weight.parts, weight.prepared
    y: Tensor = svdquant(
        x.reshape(-1, weight.shape[1]).bfloat16(),
        parts["codes"],
        parts["block_scale"],
        prepared["scale"],
        prepared["smoothing"],
        prepared["down"],
        prepared["up"],
        prepared["global_scale"],
        None if bias is None else bias.bfloat16(),
    )
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("mezzotint::flashinfer_nvfp4", mutates_args=())
def nvfp4(
    z: Tensor, codes: Tensor, block_scale: Tensor, global_scale: Tensor, alpha: Tensor
) -> Tensor:
    """Quantize z, BF16 [rows, in], and multiply it by the codes; return BF16 [rows, out].

    FlashInfer's global scale is the reciprocal of ours.
    """
    import flashinfer

    # FlashInfer takes e4m3 scales as bytes, and the second operand column-major.
    z_quantized, z_scale = flashinfer.nvfp4_quantize(z.contiguous(), 1 / global_scale.reshape(1))
    y: Tensor = flashinfer.mm_fp4(
        z_quantized,
        codes.t(),
        z_scale,
        block_scale.view(torch.uint8).t(),
        (alpha * global_scale).reshape(1),
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
    global_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Run the layer that `svdquant_operands` describes: x, BF16 [rows, in], to BF16 [rows, out]."""
    import flashinfer

    y: Tensor = flashinfer.svdquant_linear(
        x.contiguous(),
        codes,
        block_scale.view(torch.uint8),
        scale.reshape(1),
        smoothing,
        down,
        up,
        1 / global_scale.reshape(1),
        bias=bias,
    )
    return y


@nvfp4.register_fake
def _(z: Tensor, codes: Tensor, *_: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], codes.shape[0])


@svdquant.register_fake
def _(x: Tensor, codes: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


BACKEND = FlashInfer()
