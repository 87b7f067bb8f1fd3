"""The FP8 matrix product that several backends end in, and the scales it takes.

Written in ordinary PyTorch operations, so that torch.compile may fuse the rounding of the input into whatever
produced it.
"""

import os

import torch
from torch import Tensor

from mezzotint.schemes.fp8 import input_scale_by_row
from mezzotint.schemes.rounding import round_e4m3
from mezzotint.schemes.scheme import Parts

os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")
"""PyTorch reads it before its first product. With memory to work in, cuBLASLt chooses kernels that hand out their tiles
at run time and have a counter set to zero before each, as fast themselves, and 5 us apart from what precedes them."""

MULTIPLE = 16
"""cuBLASLt's FP8 product takes sides that are multiples of this."""

FEW = 8
"""Up to so many rows of input, a product takes as long as reading the matrix does."""


def fp8_product(
    x: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None
) -> Tensor:
    """x [rows, in], rounded to FP8, times an FP8 matrix, plus bias; [rows, out] in x's dtype.

    codes          e4m3 [out, in]
    weight_scale   float32 [], [1] or [out]
    bias           [out] or None
    input_scale    float32 of one number, or None for amax / 448 of each row of x
    """
    rounded, scale = round_input(x, input_scale)
    return rounded_product(rounded, scale, codes, weight_scale, bias, x.dtype)


def rounded_product(
    rounded: Tensor,
    scale: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The same of an input that `round_input` has been applied to; [rows, out] in `dtype`, written to `out` if any."""
    weight_scale = weight_scale.reshape(1, -1)
    if scale.numel() > 1 or weight_scale.numel() > 1:
        if not scales_by_row(rounded.device):
            return _scaled_behind(rounded, scale * weight_scale, codes, bias, dtype, out)
        # cuBLASLt scales either both sides by row, or neither
        scale = scale.expand(rounded.shape[0], 1).contiguous()
        weight_scale = weight_scale.expand(1, codes.shape[0]).contiguous()
    fused = bias is not None and bias.dtype == dtype and dtype != torch.float32
    product = _scaled_mm(rounded, codes, scale, weight_scale, bias if fused else None, dtype, out)
    if bias is not None and not fused:  # cuBLASLt adds no bias to a float32 product
        product = torch.add(product, bias.to(dtype), out=out)
    return product


def _scaled_behind(
    rounded: Tensor, scale: Tensor, codes: Tensor, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    """The product of the codes, rounded to `dtype`, times scale [rows or 1, out or 1]."""
    one = scale.new_ones(1, 1)
    scaled = _scaled_mm(rounded, codes, one, one, None, dtype, None).float() * scale
    scaled = (scaled if bias is None else scaled + bias.float()).to(dtype)
    return scaled if out is None else out.copy_(scaled)


def _scaled_mm(
    rounded: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    given = {} if out is None else {"out": out}
    return torch._scaled_mm(
        rounded,
        codes.t(),
        scale_a=scale,
        scale_b=weight_scale,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
        **given,
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def scales_by_row(device: torch.device) -> bool:
    """Whether PyTorch's FP8 product takes scales by row there: cuBLASLt does on Hopper only, and kernels in place of it
    for newer GPUs came later (pytorch issue 192707: none for sm_120 in 2.10)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < (10, 0)


def round_input(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [rows, in] in e4m3, and the scale that it is in units of: float32 [1, 1] or [rows, 1]."""
    scale = input_scale_by_row(x) if input_scale is None else input_scale.float().reshape(1, 1)
    return round_e4m3(x.float() / scale), scale


def scaled_input(x: Tensor, parts: Parts) -> Tensor:
    """What the matrix multiplies and a static input scale was measured on: the input times pre_quant_scale."""
    return x * parts["pre_quant_scale"].to(x.dtype) if "pre_quant_scale" in parts else x
