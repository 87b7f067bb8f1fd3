"""torch.ops.mezzotint.norm_rope: queries or keys normalised by head, rotated, and put after those of the text."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

HEADS = 8
"""Heads that one program takes."""


@triton.jit
def _norm_rope(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    x_batch,
    x_token,
    cos_batch,
    cos_token,
    cos_pair,
    first,
    tokens,
    all_tokens,
    heads,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
):
    token, batch = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lane, pair = tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    inside = (head < heads)[:, None]
    at = batch.to(tl.int64) * x_batch + token.to(tl.int64) * x_token + head[:, None] * WIDTH + lane[None, :]
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + EPS)[:, None] * tl.load(weight_ptr + lane).to(tl.float32)[None, :]
    even, odd = tl.split(x.reshape(HEADS, WIDTH // 2, 2))
    angle = batch * cos_batch + (first + token) * cos_token + pair * cos_pair
    cos, sin = tl.load(cos_ptr + angle)[None, :], tl.load(sin_ptr + angle)[None, :]
    turned = tl.join(_rounded(even * cos - odd * sin, out_ptr), _rounded(even * sin + odd * cos, out_ptr))
    row = (batch.to(tl.int64) * all_tokens + first + token) * heads
    place = (row + head[:, None]) * WIDTH + lane[None, :]
    tl.store(out_ptr + place, turned.reshape(HEADS, WIDTH), inside)


@triton.jit
def _rounded(x, out_ptr):
    """x in the dtype of the result; as bytes where that is e4m3, which Triton 3.6 cannot interleave."""
    if out_ptr.dtype.element_ty == tl.uint8:
        return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return x.to(out_ptr.dtype.element_ty)


@triton_op("mezzotint::norm_rope", mutates_args={})
def norm_rope(
    picture: Tensor,
    text: Tensor | None,
    picture_weight: Tensor,
    text_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    fp8: bool,
) -> Tensor:
    """See `mezzotint.speed.attention_layers.norm_rope_by_definition`, which says what is computed.

    picture, text   [batch, tokens, heads, width], the last two axes dense; text comes first in the result
    cos, sin        float32 [1 or batch, all tokens, width / 2], of the same strides
    Returns         [batch, all tokens, heads, width], e4m3 if fp8 else in the picture's dtype
    """
    batch, tokens, heads, width = picture.shape
    before = 0 if text is None else text.shape[1]
    dtype = torch.uint8 if fp8 else picture.dtype
    out = torch.empty(batch, before + tokens, heads, width, dtype=dtype, device=picture.device)
    streams = [(picture, picture_weight, before)]
    if text is not None and text_weight is not None:
        streams.append((text, text_weight, 0))
    for x, weight, first in streams:
        wrap_triton(_norm_rope)[x.shape[1], triton.cdiv(heads, HEADS), batch](
            x,
            weight,
            cos,
            sin,
            out,
            x.stride(0),
            x.stride(1),
            cos.stride(0) if cos.shape[0] > 1 else 0,
            cos.stride(1),
            cos.stride(2),
            first,
            x.shape[1],
            before + tokens,
            heads,
            EPS=eps,
            WIDTH=width,
            HEADS=HEADS,
            num_warps=4,
        )
    return out.view(torch.float8_e4m3fn) if fp8 else out
