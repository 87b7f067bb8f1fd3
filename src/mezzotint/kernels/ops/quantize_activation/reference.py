"""Define activation functions followed by FP8 quantization; the kernels must match it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.kernels.fp8_gemm import quantize_activation


def apply_activation(x: Tensor, activation: str) -> Tensor:
    """Compute GELU (tanh approximation), or silu(a) * b for x = [a, b]; in float32."""
    if activation == "gelu":
        return F.gelu(x.float(), approximate="tanh")
    gate, up = x.float().chunk(2, -1)
    return F.silu(gate) * up


def activation_quantize_reference(
    x: Tensor, prefix: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Quantize [prefix, activation(x)] to e4m3 with one scale per row: amax / 448.

    x, prefix    [rows, any]; prefix may be None
    activation   "gelu" or "swiglu"; the result of SwiGLU is rounded to x's dtype first
    Returns      codes e4m3 [rows, prefix + active columns]; scale float32 [rows, 1]
    """
    y = apply_activation(x, activation)
    y = y.to(x.dtype).float() if activation == "swiglu" else y
    y = y if prefix is None else torch.cat((prefix.float(), y), -1)
    return quantize_activation(y, None)
