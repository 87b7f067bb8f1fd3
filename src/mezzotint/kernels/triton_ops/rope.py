"""torch.ops.mezzotint.norm_rope: queries and keys normalised by head and rotated, those of text and picture at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mezzotint.kernels.triton_ops.codes import to_e4m3

HEADS = 16
"""Heads that one program takes, of a token's queries and keys."""


@triton.jit
def _norm_rope(
    x_ptr,
    query_ptr,
    key_ptr,
    text_query_ptr,
    text_key_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    x_batch,
    x_token,
    cos_batch,
    cos_token,
    cos_pair,
    before,
    tokens,
    heads,
    parts,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tokens - 1 - tl.program_id(0) // parts  # the last ones were written last, and are still in the cache
    batch = tl.program_id(1)
    head = tl.program_id(0) % parts * HEADS + tl.arange(0, HEADS)  # the queries' first, then as many keys'
    lane, pair = tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    inside = (head < 2 * heads)[:, None]
    at = batch.to(tl.int64) * x_batch + token.to(tl.int64) * x_token + head[:, None] * WIDTH + lane[None, :]
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    of_text = token < before
    query = tl.where(of_text, tl.load(text_query_ptr + lane), tl.load(query_ptr + lane)).to(tl.float32)
    key = tl.where(of_text, tl.load(text_key_ptr + lane), tl.load(key_ptr + lane)).to(tl.float32)
    weight = tl.where((head < heads)[:, None], query[None, :], key[None, :])
    x = x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + EPS)[:, None] * weight
    even, odd = tl.split(x.reshape(HEADS, WIDTH // 2, 2))
    angle = batch * cos_batch + token * cos_token + pair * cos_pair
    cos, sin = tl.load(cos_ptr + angle)[None, :], tl.load(sin_ptr + angle)[None, :]
    turned = tl.join(_rounded(even * cos - odd * sin, out_ptr), _rounded(even * sin + odd * cos, out_ptr))
    row = (batch.to(tl.int64) * tokens + token) * 2 * heads
    place = (row + head[:, None]) * WIDTH + lane[None, :]
    tl.store(out_ptr + place, turned.reshape(HEADS, WIDTH), inside)


@triton.jit
def _rounded(x, out_ptr):
    """x in the dtype of the result; as bytes where that is e4m3, which Triton 3.6 cannot interleave."""
    if out_ptr.dtype.element_ty == tl.uint8:
        return to_e4m3(x).to(tl.uint8, bitcast=True)
    return x.to(out_ptr.dtype.element_ty)


@triton_op("mezzotint::norm_rope", mutates_args={})
def norm_rope(
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    text_query_weight: Tensor | None,
    text_key_weight: Tensor | None,
    before: int,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    fp8: bool,
) -> Tensor:
    """See `mezzotint.speed.attention_layers.norm_rope_by_definition`, which says what is computed.

    The last two axes of x are dense; cos and sin are float32 and of the same strides.
    """
    batch, tokens, heads, width = x.shape
    out = torch.empty(x.shape, dtype=torch.uint8 if fp8 else x.dtype, device=x.device)
    parts = triton.cdiv(heads, HEADS)
    wrap_triton(_norm_rope)[tokens * parts, batch](  # tokens on an axis of their own would end at 65535
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
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        cos.stride(2),
        before,
        tokens,
        heads // 2,
        parts,
        EPS=eps,
        WIDTH=width,
        HEADS=HEADS,
        num_warps=4,
    )
    return out.view(torch.float8_e4m3fn) if fp8 else out
