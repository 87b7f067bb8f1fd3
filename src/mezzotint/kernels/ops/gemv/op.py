"""torch.ops.mezzotint.gemv4: multiply a 4-bit matrix by a few vectors."""

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mezzotint.kernels.ops.fp4_codes import CODE_SCALE
from mezzotint.kernels.ops.gemv.kernel import _gemv4_kernel

TILE_N, TILE_K, WARPS = 8, 1024, 4


@triton_op("mezzotint::gemv4", mutates_args={})
def gemv4(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    block_zero: Tensor | None,
    factor: Tensor,
    kind: int,
    group: int,
) -> Tensor:
    """Compute `gemv4_reference`, which describes the operands; x must be contiguous."""
    n, k = codes.shape[0], codes.shape[1] * 2
    m = x.shape[0]
    out = torch.empty(m, n, dtype=torch.float32, device=x.device)
    wrap_triton(_gemv4_kernel)[(triton.cdiv(n, TILE_N),)](
        x,
        codes,
        block_scale,
        # An absent operand needs some pointer; the kernel never reads it.
        block_scale if block_zero is None else block_zero,
        factor,
        out,
        n,
        k,
        KIND=kind,
        CODE_SCALE=CODE_SCALE[kind],
        GROUP=group,
        HAS_ZERO=block_zero is not None,
        # Triton's ranges have power-of-two lengths. The loop over vectors runs M times only.
        M=m,
        PADDED_M=triton.next_power_of_2(m),
        TILE_N=TILE_N,
        TILE_K=TILE_K,
        num_warps=WARPS,
    )
    return out
