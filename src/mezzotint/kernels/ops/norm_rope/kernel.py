"""RMS norm per head and rotary embedding: a program processes some heads of one token."""

import triton
import triton.language as tl

from mezzotint.kernels.ops.fp4_codes import to_e4m3


@triton.jit
def _norm_rope_kernel(
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
    text_tokens,
    tokens,
    heads,
    programs_per_token,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
):
    # Process the last tokens first: they were written last and are still in the L2 cache.
    token = tokens - 1 - tl.program_id(0) // programs_per_token
    batch = tl.program_id(1)
    # Query heads come first, then as many key heads.
    head = tl.program_id(0) % programs_per_token * HEADS + tl.arange(0, HEADS)
    lane, pair = tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    head_mask = (head < 2 * heads)[:, None]
    offset = (
        batch.to(tl.int64) * x_batch
        + token.to(tl.int64) * x_token
        + head[:, None] * WIDTH
        + lane[None, :]
    )
    x = tl.load(x_ptr + offset, head_mask, 0.0).to(tl.float32)
    is_text = token < text_tokens
    query = _norm_weight(is_text, text_query_ptr, query_ptr, lane)
    key = _norm_weight(is_text, text_key_ptr, key_ptr, lane)
    weight = tl.where((head < heads)[:, None], query[None, :], key[None, :])
    x = x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + EPS)[:, None] * weight
    # Diffusers' models rotate adjacent lanes, not the two halves of a head.
    even, odd = tl.split(x.reshape(HEADS, WIDTH // 2, 2))
    angle = batch * cos_batch + token * cos_token + pair * cos_pair
    cos, sin = tl.load(cos_ptr + angle)[None, :], tl.load(sin_ptr + angle)[None, :]
    rotated = tl.join(
        _to_output_dtype(even * cos - odd * sin, out_ptr),
        _to_output_dtype(even * sin + odd * cos, out_ptr),
    )
    row = (batch.to(tl.int64) * tokens + token) * 2 * heads
    out_offset = (row + head[:, None]) * WIDTH + lane[None, :]
    tl.store(out_ptr + out_offset, rotated.reshape(HEADS, WIDTH), head_mask)


@triton.jit
def _norm_weight(is_text, text_ptr, image_ptr, lane):
    """Return the norm weight of the token's stream, float32 [WIDTH]."""
    weight = tl.where(is_text, tl.load(text_ptr + lane), tl.load(image_ptr + lane))
    return weight.to(tl.float32)


@triton.jit
def _to_output_dtype(x, out_ptr):
    """Convert x to the output's dtype; uint8 means the bytes of e4m3.

    Triton 3.6 cannot `join` e4m3 tensors, but it can join their bytes.
    """
    if out_ptr.dtype.element_ty == tl.uint8:
        return to_e4m3(x).to(tl.uint8, bitcast=True)
    return x.to(out_ptr.dtype.element_ty)
