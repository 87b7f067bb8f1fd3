"""torch.ops.mezzotint.norm_rope: RMS norm and rotary embedding of text and image tokens."""

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mezzotint.kernels.ops.norm_rope.kernel import _norm_rope_kernel

HEADS_PER_PROGRAM = 16
"""Heads per program, over the queries and keys of one token."""


@triton_op("mezzotint::norm_rope", mutates_args={})
def norm_rope(
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    text_query_weight: Tensor | None,
    text_key_weight: Tensor | None,
    text_tokens: int,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    fp8: bool,
) -> Tensor:
    """Compute `norm_rope_reference`, which describes the operands.

    The last two axes of x must be contiguous; cos and sin are float32 with the same strides.
    """
    batch, tokens, heads, width = x.shape
    out = torch.empty(x.shape, dtype=torch.uint8 if fp8 else x.dtype, device=x.device)
    # Programs of one token are adjacent. In this order FLUX.1 takes 39 us; with the first heads of
    # all tokens first it took 45 (benchmarks/NOTES.md).
    programs_per_token = triton.cdiv(heads, HEADS_PER_PROGRAM)
    # Tokens are on the first axis of the grid: CUDA limits the others to 65535 blocks.
    grid = tokens * programs_per_token, batch
    wrap_triton(_norm_rope_kernel)[grid](
        x,
        query_weight,
        key_weight,
        query_weight if text_query_weight is None else text_query_weight,
        key_weight if text_key_weight is None else text_key_weight,
        cos,
        sin,
        out,
        x.stride(0),
        x.stride(1),
        cos.stride(0) if cos.shape[0] > 1 else 0,  # 0 repeats the angles for every sample
        cos.stride(1),
        cos.stride(2),
        text_tokens,
        tokens,
        heads // 2,
        programs_per_token,
        EPS=eps,
        WIDTH=width,
        HEADS=HEADS_PER_PROGRAM,
        num_warps=4,
    )
    return out.view(torch.float8_e4m3fn) if fp8 else out
