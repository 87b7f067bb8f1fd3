"""Attention layers of the families whose heads are normalised and then rotated, with that done in one pass.

Each takes the place of the diffusers processor of the same layer and computes the same function. Diffusers writes norm
and rotation as separate operations (Qwen-Image and Z-Image with complex numbers, which Inductor cannot fuse), so that
queries and keys go through memory several times.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.nn import GroupedLinear, QuantLinear, attention_is_exact
from mezzotint.schemes.rounding import round_e4m3
from mezzotint.speed.attention import Attention
from mezzotint.speed.rounded_products import Columns, RoundedProduct, as_chosen, in_fp8, rounded_operands

Angles = tuple[Tensor, Tensor]
"""cos and sin of each token's and pair's angle, float32 [1 or batch, tokens, width / 2]."""


def norm_rope_by_definition(
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
    """x / sqrt(mean(x^2) + eps) * weight over each head, each pair of lanes turned by its angle.

    In float32 from the input to the result, which is rounded once.

    x          [batch, tokens, heads, width], the first half of the heads queries, the other half keys
    *_weight   [width]; the text's for the first `before` tokens
    cos, sin   [1 or batch, tokens, width / 2]
    Returns    the same shape, e4m3 if fp8 else in x's dtype
    """
    normed = []
    for own, weight, text_weight in zip(
        x.chunk(2, 2), (query_weight, key_weight), (text_query_weight, text_key_weight), strict=True
    ):
        text = _normed(own[:, :before], weight if text_weight is None else text_weight, eps)
        normed.append(torch.cat((text, _normed(own[:, before:], weight, eps)), 1))
    y = torch.cat(normed, 2)
    even, odd = y[..., 0::2], y[..., 1::2]
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    turned = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)
    return round_e4m3(turned) if fp8 else turned.to(x.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


class JointAttention:
    """Text and picture in one attention: FLUX.1, FLUX.2's double blocks, Qwen-Image; Z-Image has one stream."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Any:
        text = encoder_hidden_states
        mask = _joint_mask(attention_mask, encoder_hidden_states_mask, hidden_states)
        angles = _angles(image_rotary_emb if freqs_cis is None else freqs_cis)
        before = 0 if text is None else text.shape[1]
        out = _attend(self.attention, attn, _qkv(attn, hidden_states, text), before, angles, mask)
        if text is None:
            return attn.to_out[0](out) if hasattr(attn, "to_out") else out
        return attn.to_out[0](out[:, before:]), attn.to_add_out(out[:, :before])


class ParallelAttention:
    """FLUX.2's single blocks: attention and feed-forward side by side, between two products."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        product = attn.to_qkv_mlp_proj
        active: Any
        if isinstance(product, RoundedProduct):
            qkv, active = product.split(hidden_states, attn.inner_dim)
        else:
            both = product(hidden_states)
            qkv, active = both[..., : 3 * attn.inner_dim], attn.mlp_act_fn(both[..., 3 * attn.inner_dim :])
        out = _attend(self.attention, attn, qkv, 0, _angles(image_rotary_emb), attention_mask)
        result: Tensor = attn.to_out(
            product.beside(out, active) if isinstance(product, RoundedProduct) else torch.cat((out, active), -1)
        )
        return result


REPLACED: dict[str, Callable[[Attention], Any]] = {
    "FluxAttnProcessor": JointAttention,
    "Flux2AttnProcessor": JointAttention,
    "QwenDoubleStreamAttnProcessor2_0": JointAttention,
    "ZSingleStreamAttnProcessor": JointAttention,
    "Flux2ParallelSelfAttnProcessor": ParallelAttention,
}
"""{diffusers' processor: ours}"""


def replace_layers(model: nn.Module, attention: Attention) -> int:
    """Give the attention layers of a model on a GPU our processors, where there is one; returns to how many."""
    importlib.import_module("mezzotint.kernels.triton_ops.rope")
    importlib.import_module("mezzotint.kernels.joint_product")
    found = [layer for layer in model.modules() if type(getattr(layer, "processor", None)).__name__ in REPLACED]
    for layer in found:
        layer.processor = REPLACED[type(layer.processor).__name__](attention)
    return len(found)


def _qkv(attn: Any, picture: Tensor, text: Tensor | None) -> Tensor:
    """Queries, keys and values side by side, the text's tokens first: [batch, all tokens, 3 * width]."""
    if text is not None and as_chosen() and (joint := _joint(attn)):
        return _joint_product(joint, text, picture)
    own = _side_by_side((attn.to_q, attn.to_k, attn.to_v), picture)
    if text is None:
        return own
    return torch.cat((_side_by_side((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), text), own), 1)


def _joint(attn: Any) -> list[QuantLinear]:
    """The products of the text and of the picture, if each is one for queries, keys and values, in FP8; else none."""
    layers = [
        layer.group.joined
        for layer in (getattr(attn, "add_q_proj", None), attn.to_q)
        if isinstance(layer, GroupedLinear) and layer.member == 0 and len(layer.group.widths) == 3
    ]
    return layers if len(layers) == 2 and all(in_fp8(layer) for layer in layers) else []


def _joint_product(layers: Sequence[QuantLinear], text: Tensor, picture: Tensor) -> Tensor:
    """Queries, keys and values of both, the text's first: [batch, all tokens, 3 * width]."""
    given: list[Any] = []
    for layer, x in zip(layers, (text, picture), strict=True):
        rounded, *others = rounded_operands(layer, x)
        given += [rounded.view(x.shape), *others]
    out: Tensor = torch.ops.mezzotint.joint_product(*given)
    return out


def _side_by_side(layers: Sequence[Any], x: Tensor) -> Tensor:
    """What several layers make of x, one after another along the last axis, without a copy if they are one product."""
    first = layers[0]
    if isinstance(first, GroupedLinear) and all(
        isinstance(layer, GroupedLinear) and layer.group is first.group and layer.member == first.member + place
        for place, layer in enumerate(layers)
    ):
        return first.group.take(x, first.member, len(layers))
    if isinstance(first, Columns):
        return x[..., first.first : first.first + sum(layer.out_features for layer in layers)]
    return torch.cat([layer(x) for layer in layers], -1)


def _angles(rotary: Any) -> Angles:
    """From what the families' position embedders give: (cos, sin) with each value twice, or complex numbers, which
    Qwen-Image has for the picture and for the text apart."""
    if isinstance(rotary, Tensor):
        pair = torch.view_as_real(rotary)
        return pair[..., 0], pair[..., 1]
    first, second = rotary
    if first.is_complex():
        pair = torch.view_as_real(torch.cat((second, first)))[None]
        return pair[..., 0], pair[..., 1]
    return first[None, :, 0::2], second[None, :, 0::2]


def _takes_fp8(attention: Attention, mask: Tensor | None) -> bool:
    return attention.fp8 and mask is None and not attention_is_exact()


def _attend(attention: Attention, attn: Any, qkv: Tensor, before: int, angles: Angles, mask: Tensor | None) -> Tensor:
    """What attention makes of queries, keys and values [batch, tokens, 3 * width], `before` tokens of them the text's:
    [batch, tokens, width]."""
    heads = qkv.view(*qkv.shape[:-1], -1, attn.norm_q.weight.shape[0])
    each = heads.shape[2] // 3
    text_weights = (attn.norm_added_q.weight, attn.norm_added_k.weight) if before else (None, None)
    turned = torch.ops.mezzotint.norm_rope(
        heads[:, :, : 2 * each],
        attn.norm_q.weight,
        attn.norm_k.weight,
        *text_weights,
        before,
        *angles,
        attn.norm_q.eps,
        _takes_fp8(attention, mask),
    )
    q, k = turned.chunk(2, 2)
    return attention.run(q, k, heads[:, :, 2 * each :], mask, None).flatten(2)


def _joint_mask(mask: Tensor | None, text_mask: Tensor | None, picture: Tensor) -> Tensor | None:
    """What may be attended to, [batch, 1, 1, tokens], or None for everything."""
    if text_mask is not None:
        whole = torch.ones(picture.shape[:2], dtype=torch.bool, device=picture.device)
        mask = torch.cat((text_mask, whole), 1)
    return mask[:, None, None, :] if mask is not None and mask.ndim == 2 else mask
