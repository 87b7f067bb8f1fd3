"""Activation quantization for FP8 GEMMs.

torch.ops.mezzotint.activation_quantize computes one scale per row.
torch.ops.mezzotint.quantize_into uses one static scale.
"""

import torch
import triton
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

from mezzotint.kernels.ops.quantize_activation.kernel import (
    _activation_quantize_kernel,
    _quantize_into_kernel,
)

TILE = 1024
WARPS = 16
"""Warps of the program that holds a whole row: up to 32768 columns."""


@custom_op("mezzotint::quantize_into", mutates_args={"out"}, device_types="cuda")
def quantize_into(x: Tensor, inverse_scale: Tensor, out: Tensor) -> None:
    """Compute out[:, :columns] = e4m3(x * inverse_scale) in place.

    x               [rows, columns]
    inverse_scale   float32, one element
    out             e4m3 [rows, at least columns]
    """
    rows, columns = x.shape
    grid = (rows, triton.cdiv(columns, TILE))
    strides = x.stride(0), out.stride(0)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _quantize_into_kernel[grid](
            x, inverse_scale, out, columns, *strides, TILE=TILE, num_warps=4
        )


quantize_into.register_fake(lambda x, inverse_scale, out: None)


@triton_op("mezzotint::activation_quantize", mutates_args={})
def activation_quantize(x: Tensor, prefix: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """Compute `activation_quantize_reference`, which describes the operands."""
    gated = activation == "swiglu"
    rows, columns = x.shape[0], x.shape[1] // (2 if gated else 1)
    prefix_columns = 0 if prefix is None else prefix.shape[1]
    out = torch.empty(rows, prefix_columns + columns, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    wrap_triton(_activation_quantize_kernel)[(rows,)](
        x,
        x if prefix is None else prefix,
        out,
        scale,
        columns,
        prefix_columns,
        x.stride(0),
        0 if prefix is None else prefix.stride(0),
        GATED=gated,
        HAS_PREFIX=prefix is not None,
        # Triton's ranges have power-of-two lengths; the kernel masks the rest.
        COLUMNS=triton.next_power_of_2(columns),
        PREFIX=triton.next_power_of_2(max(prefix_columns, 1)),
        num_warps=WARPS,
    )
    return out, scale
