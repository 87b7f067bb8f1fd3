"""torch.ops.mezzotint.unpack_int8: unpack a 4-bit matrix to INT8 for the GEMM that follows."""

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mezzotint.kernels.ops.unpack_int8.kernel import _unpack_int8_kernel

TILE_N, TILE_K, WARPS = 16, 256, 4
"""Tile size and warps of a program, those of `dequant_fp8`."""


@triton_op("mezzotint::unpack_int8", mutates_args={})
def unpack_int8(codes: Tensor, block_scale: Tensor | None, codebook: Tensor | None) -> Tensor:
    """Compute `unpack_int8_reference`, which describes the operands."""
    n, k = codes.shape[0], codes.shape[1] * 2
    out = torch.empty(n, k, dtype=torch.int8, device=codes.device)
    wrap_triton(_unpack_int8_kernel)[triton.cdiv(n, TILE_N), triton.cdiv(k, TILE_K)](
        codes,
        # Absent operands need some pointer; the kernel never reads it.
        codes if block_scale is None else block_scale,
        codes if codebook is None else codebook,
        out,
        n,
        k,
        1 if block_scale is None else k // block_scale.shape[1],
        HAS_BLOCKS=block_scale is not None,
        HAS_CODEBOOK=codebook is not None,
        TILE_N=TILE_N,
        TILE_K=TILE_K,
        num_warps=WARPS,
    )
    return out
