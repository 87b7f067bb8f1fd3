"""Define the quantization of an INT8 GEMM's input; the kernel must match it."""

import torch
from torch import Tensor

from mezzotint.kernels.ops.quantize_activation.reference import apply_activation
from mezzotint.schemes.int8 import to_int8
from mezzotint.schemes.rotation import rotate

ACTIVATIONS = ("none", "gelu", "swiglu")
"""Their index is the value of ACTIVATION in kernel.cu."""


def quantize_int8_reference(
    x: Tensor,
    prefix: Tensor | None,
    signs: Tensor | None,
    input_scale: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Quantize the rotation of [prefix, activation(x)] to INT8, row by row.

    x, prefix     [rows, any]; prefix may be None
    signs         int8 [group, group], see `mezzotint.schemes.rotation`; None for no rotation
    input_scale   float32, one element, or None for one scale per row: amax / 127
    activation    "none", "gelu" (tanh approximation), or "swiglu": silu(a) * b for x = [a, b]
    Returns       codes int8 [rows, prefix + active columns]; scale float32 [rows, 1]
    """
    y = x.float() if activation == "none" else apply_activation(x, activation)
    y = y if prefix is None else torch.cat((prefix.float(), y), -1)
    integers, scale = to_int8(y if signs is None else rotate(y, signs), input_scale)
    return integers.to(torch.int8), scale.expand(len(y), 1).contiguous()
