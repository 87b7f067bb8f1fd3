"""Which of diffusers' modules are given products that end in an activation, and how: feed-forward layers, and single
blocks, where attention and feed-forward are side by side between two products.
"""

import importlib
from collections.abc import Sequence
from enum import Enum
from itertools import accumulate
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.errors import ShapeMismatch
from mezzotint.kernels import Target
from mezzotint.kernels.cuda.product import missing
from mezzotint.nn import QuantLinear, SplitLinear
from mezzotint.speed.fusing import joined
from mezzotint.speed.rounded_products import (
    ActivationRounding,
    Columns,
    Rounded,
    RoundedLinear,
    RoundedPieces,
    RoundedProduct,
    in_fp8,
    rounds_by_row,
)


class Outcome(Enum):
    """What became of a product and the activation behind it."""

    REPLACED = "the activation is part of the product, or follows in one pass"
    OUTSIDE = "the activation would be part of the product, if that could run here"
    APART = "the layers around the activation do not read FP8, or not in a form that is known here"


def replace_rounded_products(model: nn.Module, target: Target) -> tuple[int, str | None]:
    """Do so wherever the layer behind an activation multiplies in FP8, in a model on a GPU.

    Returns how often, and why no activation is part of a product, if that is because of `target`.
    """
    importlib.import_module("mezzotint.kernels.triton_ops.round")
    reason = missing(target)
    found = [module for module in model.modules() if type(module).__name__ in REWRITTEN]
    outcomes = [REWRITTEN[type(module).__name__](module, reason is None) for module in found]
    return outcomes.count(Outcome.REPLACED), reason if Outcome.OUTSIDE in outcomes else None


def _feed_forward(module: Any, possible: bool) -> Outcome:
    """Two classes of diffusers' have this name."""
    return _gelu_feed_forward(module, possible) if hasattr(module, "net") else _zimage(module, possible)


def _gelu_feed_forward(module: Any, possible: bool) -> Outcome:
    """FLUX.1's, Qwen-Image's and Wan's: a GELU that owns its layer, dropout, a layer."""
    first, last = module.net[0], module.net[-1]
    if getattr(first, "approximate", None) != "tanh" or not in_fp8(last):
        return Outcome.APART
    if rounds_by_row(last):
        module.net = nn.ModuleList([first.proj, ActivationRounding("gelu"), RoundedLinear(last)])
        return Outcome.REPLACED
    if not in_fp8(first.proj):
        return Outcome.APART
    if not possible:
        return Outcome.OUTSIDE
    module.net = nn.ModuleList([RoundedProduct(first.proj, last, "gelu"), RoundedLinear(last)])
    return Outcome.REPLACED


def _flux2_feed_forward(module: Any, possible: bool) -> Outcome:
    """Flux2FeedForward: gate and up in one layer."""
    if not in_fp8(module.linear_out):
        return Outcome.APART
    if rounds_by_row(module.linear_out):
        module.act_fn, module.linear_out = ActivationRounding("swiglu"), RoundedLinear(module.linear_out)
        return Outcome.REPLACED
    if not in_fp8(module.linear_in):
        return Outcome.APART
    if not possible:
        return Outcome.OUTSIDE
    module.linear_in = RoundedProduct(module.linear_in, module.linear_out, "swiglu")
    module.act_fn = nn.Identity()
    module.linear_out = RoundedLinear(module.linear_out)
    return Outcome.REPLACED


def _flux2_single(attn: Any, possible: bool) -> Outcome:
    """FLUX.2's, where one layer makes queries, keys, values, gate and up, if ParallelAttention reads it or is to."""
    read = type(attn.processor).__name__ in ("Flux2ParallelSelfAttnProcessor", "ParallelAttention")
    if not (read and in_fp8(attn.to_qkv_mlp_proj) and in_fp8(attn.to_out)) or rounds_by_row(attn.to_out):
        return Outcome.APART
    if not possible:
        return Outcome.OUTSIDE
    attn.to_qkv_mlp_proj = RoundedProduct(attn.to_qkv_mlp_proj, attn.to_out, "swiglu", 3 * attn.inner_dim)
    attn.to_out = RoundedLinear(attn.to_out)
    return Outcome.REPLACED


def _zimage(module: Any, possible: bool) -> Outcome:
    """Z-Image's: gate w1 and up w3 in layers of their own."""
    layers = [module.w1, module.w3]
    if not all(in_fp8(layer) for layer in (*layers, module.w2)):
        return Outcome.APART
    by_row = rounds_by_row(module.w2)
    if not (by_row or possible):
        return Outcome.OUTSIDE
    both = _joined(layers)
    if both is None:
        return Outcome.APART
    behind = nn.Sequential(both, ActivationRounding("swiglu")) if by_row else RoundedProduct(both, module.w2, "swiglu")
    module.w1, module.w3 = behind, nn.Identity()
    module._forward_silu_gating = _first
    module.w2 = RoundedLinear(module.w2)
    return Outcome.REPLACED


def _first(rounded: Rounded, _x: Tensor) -> Rounded:
    return rounded


def _flux1_single(block: Any, possible: bool) -> Outcome:
    """FLUX.1's, where attention and feed-forward are side by side between two products."""
    following = block.proj_out
    if isinstance(following, SplitLinear):
        return _flux1_single_in_pieces(block, following)
    if not in_fp8(following):
        return Outcome.APART
    if rounds_by_row(following):
        block.act_mlp = ActivationRounding("gelu")
    elif not in_fp8(block.proj_mlp):
        return Outcome.APART
    elif not possible:
        return Outcome.OUTSIDE
    else:
        block.proj_mlp = _product_of_all(block, block.attn, following)
    block.proj_out = RoundedLinear(following)
    block.forward = MethodType(flux1_single_block, block)
    return Outcome.REPLACED


def _flux1_single_in_pieces(block: Any, following: SplitLinear) -> Outcome:
    """The same where the second product is stored in two pieces, the attention's and the feed-forward part's.

    Each piece scales its rows for itself, so that nothing has to stand side by side.
    """
    _attention, *others = following.products
    if [piece.in_features for piece in others] != [block.mlp_hidden_dim] or not rounds_by_row(others[0]):
        return Outcome.APART
    block.act_mlp, block.proj_out = ActivationRounding("gelu"), RoundedPieces(following)
    block.forward = MethodType(flux1_single_block, block)
    return Outcome.REPLACED


def _product_of_all(block: Any, attn: Any, following: QuantLinear) -> RoundedProduct:
    """That of queries, keys, values and the feed-forward part if they can be one, else of the latter alone."""
    layers = [attn.to_q, attn.to_k, attn.to_v, block.proj_mlp]
    one = _joined(layers)
    if one is None:
        return RoundedProduct(block.proj_mlp, following, "gelu")
    *widths, _active = (layer.out_features for layer in layers)
    firsts = accumulate(widths, initial=0)
    attn.to_q, attn.to_k, attn.to_v = (Columns(first, width) for first, width in zip(firsts, widths, strict=False))
    return RoundedProduct(one, following, "gelu", sum(widths))


REWRITTEN = {
    "FeedForward": _feed_forward,
    "Flux2FeedForward": _flux2_feed_forward,
    "Flux2ParallelSelfAttention": _flux2_single,
    "FluxSingleTransformerBlock": _flux1_single,
}
"""{diffusers' class: what rewrites one, if a product can end in an activation here}"""


def flux1_single_block(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """FluxSingleTransformerBlock's forward, of text and picture apart."""
    text = encoder_hidden_states.shape[1]
    x = flux1_single_stream(block, torch.cat((encoder_hidden_states, hidden_states), 1), *args, **kwargs)
    return x[:, :text], x[:, text:]


def flux1_single_stream(
    block: Any,
    x: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """The same of the text's tokens and then the picture's: the attention's result goes to what multiplies or holds it.

    Where there is one product for queries, keys, values and the feed-forward part, the attention is given its columns.
    """
    normed, gate = block.norm(x, emb=temb)
    product = block.proj_mlp
    in_product = isinstance(product, RoundedProduct)
    qkv, active = product.split(normed, normed.shape[-1]) if in_product else (None, product(normed))
    given = qkv if in_product and product.plain else normed
    attended = block.attn(hidden_states=given, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    total: Tensor = x + gate.unsqueeze(1) * _projected(block, attended, active)
    return total


def _projected(block: Any, attended: Tensor, active: Tensor | Rounded) -> Tensor:
    """proj_out of the attention's result and of the feed-forward part, whose GELU is in its product or to come."""
    if isinstance(block.proj_out, RoundedPieces):
        both: tuple[Any, ...] = attended, block.act_mlp(active)
    elif isinstance(block.proj_mlp, RoundedProduct):
        both = (block.proj_mlp.beside(attended, active),)
    else:
        both = (block.act_mlp(active, attended),)
    out: Tensor = block.proj_out(*both)
    return out


def _joined(layers: Sequence[Any]) -> QuantLinear | None:
    """One layer in place of several in FP8 that read the same input, if they can be one."""
    if not all(in_fp8(layer) for layer in layers):
        return None
    try:
        return joined(layers)
    except ShapeMismatch:
        return None
