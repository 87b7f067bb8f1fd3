"""Products that end in an activation and in the rounding of the next layer's input, which reads FP8.

In BF16 what a feed-forward layer hands on goes through memory three times: written by the product, read by the
activation, which rounds it, and read again. A product whose result has one scale for all, measured beforehand, does all
of that with its own last instructions. Where each row has a scale of its own, one kernel behind the product does it.
"""

import importlib
from collections.abc import Callable, Sequence
from enum import Enum
from itertools import accumulate
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.errors import ShapeMismatch
from mezzotint.kernels import AS_STORED, Target
from mezzotint.kernels.cuda.product import activated, missing
from mezzotint.kernels.fp8_matrix import fp8_matrix, is_fp8_matrix, static_input_scale
from mezzotint.kernels.products import round_input, rounded_product
from mezzotint.nn import QuantLinear, SplitLinear, overrides
from mezzotint.speed.activations import tanh_gelu
from mezzotint.speed.fusing import joined

Rounded = tuple[Tensor, Tensor]
"""An input as an FP8 product takes it: e4m3 [..., in], and its scale, float32 [1, 1] or [rows, 1]."""


def activation_round_by_definition(x: Tensor, beside: Tensor | None, activation: str) -> Rounded:
    """activated(x), to the right of `beside`, in e4m3 in units of amax / 448 of each row.

    x, beside    [rows, any]; beside may be None
    activation   "gelu" or "swiglu"; the latter's result is rounded to x's dtype first
    """
    y = activated(x, activation)
    y = y.to(x.dtype).float() if activation == "swiglu" else y
    y = y if beside is None else torch.cat((beside.float(), y), -1)
    return round_input(y, None)


class RoundedProduct(nn.Module):
    """A linear layer whose first columns are handed on as they are and whose others go through an activation and are
    rounded as the next layer reads them.

    following    that layer, which has a static input scale
    activation   "gelu" or "swiglu"
    plain        how many columns are handed on
    """

    inverse: Tensor
    scale: Tensor

    def __init__(self, layer: QuantLinear, following: QuantLinear, activation: str, plain: int = 0) -> None:
        super().__init__()
        self.layer, self.activation, self.plain = layer, activation, plain
        scale = static_input_scale(following.weight_tensor)
        assert scale is not None  # noqa: S101
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("inverse", 1 / scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor | Rounded:
        """x [..., in] to [..., active]."""
        return self.split(x)[1]

    def split(self, x: Tensor, room: int = 0) -> tuple[Tensor, Tensor | Rounded]:
        """x [..., in] to [..., plain] and [..., active], with room for so many columns to the left if in FP8."""
        if not (as_chosen() and in_fp8(self.layer)):
            y = self.layer(x)
            active = activated(y[..., self.plain :], self.activation).to(y.dtype)
            return y[..., : self.plain], active
        rows, input_scale, codes, weight_scale, bias = rounded_operands(self.layer, x)
        plain, rounded = torch.ops.mezzotint.product(
            rows, codes, bias, input_scale, weight_scale, self.inverse, self.activation, self.plain, room
        )
        shape = x.shape[:-1]
        return plain.reshape(*shape, -1), (rounded.reshape(*shape, -1), self.scale.reshape(1, 1))

    def beside(self, left: Tensor, active: Tensor | Rounded) -> Tensor | Rounded:
        """`left` [..., room] rounded too, and put in its place."""
        if isinstance(active, Tensor):
            return torch.cat((left, active), -1)
        torch.ops.mezzotint.round_into(_rows(left), self.inverse, _rows(active[0]))
        return active

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoundedProduct":
        """What `.to()` and its kin call: scales are moved, and stay float32."""
        before = self.scale, self.inverse
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale, self.inverse = (scale.to(self.scale.device) for scale in before)
        return self


class ActivationRounding(nn.Module):
    """GELU or SwiGLU behind a product, rounded to FP8 with a scale for each row."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor | Rounded:
        """x [..., out] to [..., active], and `beside` [..., any] to its left."""
        if not as_chosen():
            y = tanh_gelu(x) if self.activation == "gelu" else activated(x, self.activation).to(x.dtype)
            return y if beside is None else torch.cat((beside, y), -1)
        left = None if beside is None else _rows(beside)
        codes, scale = torch.ops.mezzotint.activation_round(_rows(x), left, self.activation)
        return codes.reshape(*x.shape[:-1], -1), scale


class RoundedLinear(nn.Module):
    """The layer behind: an input in FP8 is multiplied as it is, any other by the layer itself."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor | Rounded) -> Tensor:
        if isinstance(x, Tensor):
            own: Tensor = self.layer(x)
            return own
        rounded, scale = x
        codes, weight_scale, bias = fp8_matrix(self.layer.weight_tensor, self.layer.bias)
        y = rounded_product(_rows(rounded), scale, codes, weight_scale, bias, self.layer.compute_dtype)
        return y.reshape(*rounded.shape[:-1], -1)


class RoundedPieces(nn.Module):
    """The layer behind, where it is stored in two pieces: the first is given an input of its own, to round itself."""

    def __init__(self, layer: SplitLinear) -> None:
        super().__init__()
        self.first, second = layer.products
        self.second = RoundedLinear(second)

    def forward(self, left: Tensor, x: Tensor | Rounded) -> Tensor:
        """left [..., in of the first] and x [..., in of the second] to [..., out]."""
        product: Tensor = self.first(left) + self.second(x)
        return product


class Columns(nn.Module):
    """Some columns of its input, in the place of a layer whose product has been computed with others."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.first, self.out_features = first, count

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.first : self.first + self.out_features]


class Outcome(Enum):
    """What became of a product and the activation behind it."""

    REPLACED = "the activation is part of the product, or follows in one pass"
    OUTSIDE = "the activation would be part of the product, if that could run here"
    APART = "the layer behind them does not read FP8, or not with one scale"


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
    if not (read and in_fp8(attn.to_qkv_mlp_proj) and _reads_static(attn.to_out)):
        return Outcome.APART
    if not possible:
        return Outcome.OUTSIDE
    attn.to_qkv_mlp_proj = RoundedProduct(attn.to_qkv_mlp_proj, attn.to_out, "swiglu", 3 * attn.inner_dim)
    attn.to_out = RoundedLinear(attn.to_out)
    return Outcome.REPLACED


def _zimage(module: Any, possible: bool) -> Outcome:
    """Z-Image's: gate w1 and up w3 in layers of their own."""
    if not in_fp8(module.w2):
        return Outcome.APART
    by_row = rounds_by_row(module.w2)
    if not (by_row or possible):
        return Outcome.OUTSIDE if in_fp8(module.w1) and in_fp8(module.w3) else Outcome.APART
    both = _joined([module.w1, module.w3])
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
    block.forward = MethodType(_flux1_single_block, block)
    return Outcome.REPLACED


def _flux1_single_in_pieces(block: Any, following: SplitLinear) -> Outcome:
    """The same where the second product is stored in two pieces, the attention's and the feed-forward part's.

    Each piece scales its rows for itself, so that nothing has to stand side by side.
    """
    _attention, *others = following.products
    if [piece.in_features for piece in others] != [block.mlp_hidden_dim] or not rounds_by_row(others[0]):
        return Outcome.APART
    block.act_mlp, block.proj_out = ActivationRounding("gelu"), RoundedPieces(following)
    block.forward = MethodType(_flux1_single_block, block)
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


def _flux1_single_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FluxSingleTransformerBlock's forward, with the attention's result handed to whatever multiplies or holds it next.

    Where there is one product for queries, keys, values and the feed-forward part, the attention is given its columns.
    """
    x = torch.cat((encoder_hidden_states, hidden_states), 1)
    normed, gate = block.norm(x, emb=temb)
    product = block.proj_mlp
    in_product = isinstance(product, RoundedProduct)
    qkv, active = product.split(normed, normed.shape[-1]) if in_product else (None, product(normed))
    given = qkv if in_product and product.plain else normed
    attended = block.attn(hidden_states=given, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x = x + gate.unsqueeze(1) * _projected(block, attended, active)
    text = encoder_hidden_states.shape[1]
    return x[:, :text], x[:, text:]


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


def rounded_operands(layer: QuantLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x [..., in] in FP8 as rows, its scale, and the codes, scale and bias of a layer that is `in_fp8`."""
    weight = layer.weight_tensor
    return *round_input(_rows(x), static_input_scale(weight)), *fp8_matrix(weight, layer.bias)


def in_fp8(layer: Any) -> bool:
    """Whether a layer, in BF16, rounds its input to FP8 and multiplies by an FP8 matrix."""
    return (
        isinstance(layer, QuantLinear)
        and layer.activations == AS_STORED
        and layer.compute_dtype == torch.bfloat16
        and is_fp8_matrix(layer.weight_tensor, layer.selection.backend.name)
    )


def _reads_static(layer: Any) -> bool:
    """Whether its input is rounded to FP8 with one scale that was measured beforehand."""
    return in_fp8(layer) and static_input_scale(layer.weight_tensor) is not None


def rounds_by_row(layer: QuantLinear) -> bool:
    """Whether each row of its input is rounded to FP8 with a scale of its own."""
    return in_fp8(layer) and static_input_scale(layer.weight_tensor) is None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def as_chosen() -> bool:
    """Whether neither another backend nor exact inputs are asked for, which are the layers' own affair."""
    return overrides() == (None, False)
