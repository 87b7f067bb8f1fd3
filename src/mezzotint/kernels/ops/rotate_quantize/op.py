"""torch.ops.mezzotint.rotate_quantize: rotate and quantize the input of an INT8 GEMM."""

import math

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mezzotint.kernels.ops.rotate_quantize.kernel import _rotate_quantize_kernel

TILE_M, WARPS = 32, 4
"""Rows and warps of a program."""


@triton_op("mezzotint::rotate_quantize", mutates_args={})
def rotate_quantize(x: Tensor, signs: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute `rotate_quantize_reference`, which describes the operands."""
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    shape = (rows, 1) if input_scale is None else (1, 1)
    scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    wrap_triton(_rotate_quantize_kernel)[(triton.cdiv(rows, TILE_M),)](
        x,
        signs,
        scale if input_scale is None else input_scale,
        codes,
        scale,
        rows,
        columns,
        x.stride(0),
        NORM=1 / math.sqrt(len(signs)),
        STATIC=input_scale is not None,
        GROUP=len(signs),
        TILE_M=TILE_M,
        num_warps=WARPS,
    )
    return codes, scale if input_scale is None else input_scale.reshape(1, 1).clone()
