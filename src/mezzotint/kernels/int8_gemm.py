"""INT8 GEMM and activation quantization.

Without a rotation, the quantization is written in ordinary PyTorch operations, so that
torch.compile can fuse it into the producer of the input.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.kernels.ops.gemm_act.op import unavailable_reason
from mezzotint.kernels.target import Target
from mezzotint.schemes.int8 import to_int8

GEMM_ALIGNMENT = 16
"""Both GEMMs load 16 bytes of a row at a time."""
MIN_ROWS = 17
"""PyTorch's INT8 GEMM requires more than 16 rows on CUDA.

Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/Blas.cpp, _int_mm
"""


def quantize_activation(
    x: Tensor, rotation: Tensor | None, input_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rotate x [rows, in], if the layer does, and quantize it to INT8.

    rotation      int8 [group, group], see `mezzotint.schemes.rotation`
    input_scale   float32, one element, or None for one scale per row: amax / 127
    Returns       codes int8 [rows, in]; scale float32, [1, 1] or [rows, 1]
    """
    if rotation is not None:
        x = x if x.stride(1) == 1 else x.contiguous()
        rotated: tuple[Tensor, Tensor] = torch.ops.mezzotint.quantize_int8(
            x, None, rotation, input_scale, "none"
        )
        return rotated
    integers, scale = to_int8(x, input_scale)
    return integers.to(torch.int8), scale


def int8_gemm(
    x: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply a quantized input by an INT8 weight; return [rows, out] in `dtype`.

    x, x_scale     as `quantize_activation` returns them
    codes          int8 [out, in]
    weight_scale   float32 [1] or [out]
    bias           [out] or None
    """
    if dtype == torch.bfloat16 and has_fused_gemm(x.device):
        bias = None if bias is None else bias.to(dtype)
        operands = x, codes, bias, x_scale, weight_scale, None
        y: Tensor = torch.ops.mezzotint.gemm_act(*operands, "none", len(codes), 0)[0]
        return y
    rows = len(x)
    padded = F.pad(x, (0, 0, 0, max(MIN_ROWS - rows, 0)))
    sums = torch._int_mm(padded, codes.t())[:rows].float()
    y = sums * (x_scale * weight_scale.reshape(1, -1))
    return (y if bias is None else y + bias.float()).to(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_fused_gemm(device: torch.device) -> bool:
    """Return whether a kernel of ours applies scales and bias inside the GEMM on this device.

    Elsewhere cuBLASLt writes its int32 sums to memory first.
    """
    return unavailable_reason(Target.of(device)) is None
