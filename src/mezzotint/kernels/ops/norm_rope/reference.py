"""Define RMS norm and rotary embedding of queries and keys; the kernel must match it.

RMSNorm: https://arxiv.org/abs/1910.07467; rotary embedding: https://arxiv.org/abs/2104.09864.
"""

import torch
from torch import Tensor

from mezzotint.schemes.minifloats import round_e4m3


def norm_rope_reference(
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
    """Compute x / sqrt(mean(x^2) + eps) * weight per head, then rotate pairs of adjacent lanes.

    All of it is float32; the result is rounded once.

    x                 [batch, tokens, heads, width]: as many query heads as key heads, queries first
    *_weight          [width]; the text's weights apply to the first `text_tokens` tokens
    cos, sin          [1 or batch, tokens, width / 2]
    Returns           the shape of x, e4m3 if fp8, otherwise in x's dtype
    """
    query, key = x.chunk(2, 2)
    y = torch.cat(
        (
            _norm_by_stream(query, query_weight, text_query_weight, text_tokens, eps),
            _norm_by_stream(key, key_weight, text_key_weight, text_tokens, eps),
        ),
        2,
    )
    even, odd = y[..., 0::2], y[..., 1::2]
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    rotated = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)
    return round_e4m3(rotated) if fp8 else rotated.to(x.dtype)


def _norm_by_stream(
    x: Tensor, weight: Tensor, text_weight: Tensor | None, text_tokens: int, eps: float
) -> Tensor:
    text = _rms_norm(x[:, :text_tokens], weight if text_weight is None else text_weight, eps)
    return torch.cat((text, _rms_norm(x[:, text_tokens:], weight, eps)), 1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
