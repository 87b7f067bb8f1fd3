"""FP8 GEMM and activation quantization, shared by several backends.

Written in ordinary PyTorch operations, so that torch.compile can fuse the quantization into the
producer of the input.
"""

import os

import torch
from torch import Tensor

from mezzotint.schemes.fp8 import per_row_activation_scale
from mezzotint.schemes.minifloats import round_e4m3
from mezzotint.schemes.scheme import Parts

os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")
"""PyTorch reads this before its first GEMM.

With a workspace, cuBLASLt selects kernels that schedule tiles dynamically. They need a counter to
be zeroed first: equally fast, but they start 5 us later after the preceding kernel.
"""

GEMM_ALIGNMENT = 16
"""cuBLASLt's FP8 GEMM requires dimensions that are multiples of this: it loads 16 bytes at a time.

Source: https://docs.nvidia.com/cuda/cublas/, "cublasLtMatmul", FP8 data types.
"""

GEMV_MAX_ROWS = 8
"""Up to this many input rows, a GEMM takes as long as reading the weight does."""


def fp8_linear(
    x: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None
) -> Tensor:
    """Quantize x [rows, in] to FP8 and multiply it by an FP8 weight; return [rows, out].

    The result is in x's dtype.

    codes          e4m3 [out, in]
    weight_scale   float32 [], [1] or [out]
    bias           [out] or None
    input_scale    float32, one element, or None for a dynamic scale per row, amax / 448
    """
    x_quantized, x_scale = quantize_activation(x, input_scale)
    return fp8_gemm(x_quantized, x_scale, codes, weight_scale, bias, x.dtype)


def fp8_gemm(
    x_quantized: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply a quantized input by an FP8 weight; return [rows, out] in `dtype`.

    x_quantized, x_scale   as `quantize_activation` returns them
    out                    where to write the result, or None for a new tensor
    """
    weight_scale = weight_scale.reshape(1, -1)
    if x_scale.numel() > 1 or weight_scale.numel() > 1:
        if not supports_row_scales(x_quantized.device):
            return _gemm_then_scale(x_quantized, x_scale * weight_scale, codes, bias, dtype, out)
        # cuBLASLt applies row scales to both operands or to neither, and PyTorch requires them to
        # be contiguous.
        x_scale = x_scale.expand(x_quantized.shape[0], 1).contiguous()
        weight_scale = weight_scale.expand(1, codes.shape[0]).contiguous()
    # cuBLASLt cannot add a bias to a float32 GEMM, nor a bias of another dtype.
    fused = bias is not None and bias.dtype == dtype and dtype != torch.float32
    y = _scaled_mm(x_quantized, codes, x_scale, weight_scale, bias if fused else None, dtype, out)
    return y if bias is None or fused else torch.add(y, bias.to(dtype), out=out)


def _gemm_then_scale(
    x_quantized: Tensor,
    scale: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    """Multiply the codes without scales, then multiply by scale [rows or 1, out or 1].

    The unscaled output is rounded to `dtype` in between.
    """
    one = scale.new_ones(1, 1)
    y = _scaled_mm(x_quantized, codes, one, one, None, dtype, None).float() * scale
    y = (y if bias is None else y + bias.float()).to(dtype)
    return y if out is None else out.copy_(y)


def _scaled_mm(
    x_quantized: Tensor,
    codes: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    output = {} if out is None else {"out": out}
    return torch._scaled_mm(
        x_quantized,
        codes.t(),  # column-major, as cuBLASLt's FP8 GEMM requires on Ada and Hopper
        scale_a=x_scale,
        scale_b=weight_scale,
        bias=bias,
        out_dtype=dtype,
        # Partial sums are not promoted to a higher precision in between: faster, and accurate
        # enough compared with FP8 (docs/numerics.md). cuBLAS calls the option
        # CUBLASLT_MATMUL_DESC_FAST_ACCUM: https://docs.nvidia.com/cuda/cublas/.
        use_fast_accum=True,
        **output,
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def supports_row_scales(device: torch.device) -> bool:
    """Return whether PyTorch's FP8 GEMM accepts per-row scales on this device.

    cuBLASLt does on Hopper only, and PyTorch 2.10 has no other kernel for sm_120:
    https://github.com/pytorch/pytorch/issues/192707
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < (10, 0)


def quantize_activation(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize x [rows, in] to e4m3; return the codes and their scale.

    The scale is float32 [1, 1], or [rows, 1] if `input_scale` is None.
    """
    scale = (
        per_row_activation_scale(x) if input_scale is None else input_scale.float().reshape(1, 1)
    )
    return round_e4m3(x.float() / scale), scale


def apply_pre_quant_scale(x: Tensor, parts: Parts) -> Tensor:
    """Multiply the input by pre_quant_scale, if the layer has one.

    A static input scale is calibrated on the result.
    """
    return x * parts["pre_quant_scale"].to(x.dtype) if "pre_quant_scale" in parts else x
