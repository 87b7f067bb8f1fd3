"""torch.ops.mezzotint.dequant_fp8: dequantize a 4-bit matrix to FP8 for the GEMM that follows."""

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mezzotint.kernels.ops.dequant_fp8.kernel import _dequant_fp8_kernel
from mezzotint.kernels.ops.fp4_codes import CODE_SCALE

TILE_N, TILE_K, WARPS = 16, 256, 4
"""Tile size and warps of a program: the fastest of thirteen configurations on an H100.

The same one is fastest with a low-rank branch and without.
"""
MIN_DOT_RANK = 16
"""The smallest inner dimension that `tl.dot` accepts; smaller ranks are padded with zeros."""


@triton_op("mezzotint::dequant_fp8", mutates_args={})
def dequant_fp8(
    codes: Tensor,
    block_scale: Tensor,
    factor: Tensor,
    scale: Tensor,
    column: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    kind: int,
    group: int,
    low_rank_before_column_scale: bool,
) -> Tensor:
    """Compute `dequant_fp8_reference`; return e4m3 [out, in].

    codes                          uint8 [out, in/2], low nibble first
    block_scale                    e4m3 or bf16 [out, in/group]
    factor, scale, column          as `prepare_scales` returns them
    up, down                       bf16 [out, rank] and [rank, in], or None
    kind                           index into `CODE_SCALE`
    low_rank_before_column_scale   whether the branch reads the smoothed input
    """
    n, k = codes.shape[0], codes.shape[1] * 2
    out = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=codes.device)
    rank = 0 if down is None else down.shape[0]
    wrap_triton(_dequant_fp8_kernel)[triton.cdiv(n, TILE_N), triton.cdiv(k, TILE_K)](
        codes,
        block_scale,
        factor,
        scale,
        # Absent operands need some pointer; the kernel never reads it.
        factor if column is None else column,
        codes if up is None else up,
        codes if down is None else down,
        out,
        n,
        k,
        rank,
        KIND=kind,
        CODE_SCALE=CODE_SCALE[kind],
        GROUP=group,
        HAS_COLUMN=column is not None,
        HAS_LOW_RANK=down is not None,
        LOW_RANK_BEFORE_COLUMN=low_rank_before_column_scale,
        RANK=max(MIN_DOT_RANK, triton.next_power_of_2(max(rank, 1))),
        TILE_N=TILE_N,
        TILE_K=TILE_K,
        num_warps=WARPS,
    )
    return out
