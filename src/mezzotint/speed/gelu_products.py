"""GELU and the rounding of the next layer's input in one go, inside the product before them where that can do it.

In BF16 what a feed-forward layer hands on goes through memory three times: written by the product, read by the GELU,
which rounds it, and read again. A product whose result has one scale for all, measured beforehand, does all of that
with its own last instructions. Where each row has a scale of its own, a row is read once and written once.
"""

import importlib
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.kernels import AS_STORED, Target
from mezzotint.kernels.cublaslt import missing
from mezzotint.kernels.fp8_matrix import fp8_matrix, is_fp8_matrix, is_static, static_input_scale
from mezzotint.kernels.products import round_input, rounded_product
from mezzotint.nn import QuantLinear, overrides
from mezzotint.speed.activations import tanh_gelu

Rounded = tuple[Tensor, Tensor]
"""An input as an FP8 product takes it: e4m3 [..., in], and its scale, float32 [1, 1] or [rows, 1]."""


def gelu_round_by_definition(x: Tensor, beside: Tensor | None) -> Rounded:
    """gelu(x), to the right of `beside`, in e4m3 in units of amax / 448 of each row.

    x, beside   [rows, any]; beside may be None
    """
    y = F.gelu(x.float(), approximate="tanh")
    y = y if beside is None else torch.cat((beside.float(), y), -1)
    return round_input(y, None)


class GELUProduct(nn.Module):
    """A linear layer and GELU behind it as one product, which writes FP8 as the next layer reads it.

    following   the layer that reads the result
    """

    inverse: Tensor
    scale: Tensor

    def __init__(self, layer: QuantLinear, following: QuantLinear) -> None:
        super().__init__()
        self.layer = layer
        scale = static_input_scale(following.weight_tensor)
        assert scale is not None  # noqa: S101
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("inverse", 1 / scale, persistent=False)

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor | Rounded:
        """x [..., in] to [..., out], with `beside` [..., any] to its left."""
        if not _as_chosen():
            return _gelu_beside(self.layer(x), beside)
        weight = self.layer.weight_tensor
        scale = static_input_scale(weight)
        codes, weight_scale, bias = fp8_matrix(weight, self.layer.bias)
        rows, _scale = round_input(_rows(x), scale)
        product: Tensor = torch.ops.mezzotint.gelu_product(
            rows, codes, bias, scale, weight_scale, self.inverse, None if beside is None else _rows(beside)
        )
        return product.reshape(*x.shape[:-1], -1), self.scale.reshape(1, 1)


class GELURounding(nn.Module):
    """GELU behind a product, rounded to FP8 with a scale for each row."""

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor | Rounded:
        """x [..., out], and `beside` [..., any] to its left."""
        if not _as_chosen():
            return _gelu_beside(x, beside)
        codes, scale = torch.ops.mezzotint.gelu_round(_rows(x), None if beside is None else _rows(beside))
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


def replace_gelu_products(model: nn.Module, target: Target) -> int:
    """Do so wherever the layer behind GELU multiplies in FP8, in a model on a GPU; returns how often."""
    importlib.import_module("mezzotint.kernels.triton_ops.round")
    fused = missing(target) is None
    count = 0
    for module in list(model.modules()):
        if type(module).__name__ == "FeedForward":
            count += _in_feed_forward(module, fused)
        if type(module).__name__ == "FluxSingleTransformerBlock":
            count += _in_single_block(module, fused)
    return count


def _in_feed_forward(module: Any, fused: bool) -> bool:
    """diffusers' FeedForward: a GELU that owns its layer, dropout, a layer."""
    first, last = module.net[0], module.net[-1]
    gelu = _gelu(first.proj, last, fused) if getattr(first, "approximate", None) == "tanh" else None
    if gelu is None:
        return False
    before = gelu if isinstance(gelu, GELUProduct) else nn.Sequential(first.proj, gelu)
    module.net = nn.ModuleList([before, RoundedLinear(last)])
    return True


def _in_single_block(block: Any, fused: bool) -> bool:
    """FLUX.1's, where attention and feed-forward are side by side between two products."""
    gelu = _gelu(block.proj_mlp, block.proj_out, fused)
    if gelu is None:
        return False
    if isinstance(gelu, GELUProduct):
        _share_input_scale(block.attn.to_q, gelu.layer)
        block.proj_mlp, block.act_mlp = gelu, nn.Identity()
    else:
        block.act_mlp = gelu
    block.proj_out = RoundedLinear(block.proj_out)
    block.forward = MethodType(_single_block, block)
    return True


def _gelu(layer: Any, following: Any, fused: bool) -> GELUProduct | GELURounding | None:
    """What can stand between a layer and the one that reads its GELU: one product of both, or what rounds by row."""
    if not _in_fp8(following):
        return None
    if static_input_scale(following.weight_tensor) is None:
        return GELURounding()
    static = _in_fp8(layer) and is_static(layer.weight_tensor) and is_static(following.weight_tensor)
    return GELUProduct(layer, following) if fused and static else None


def _single_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FluxSingleTransformerBlock's forward, with the attention's result handed to what is to stand beside it."""
    x = torch.cat((encoder_hidden_states, hidden_states), 1)
    normed, gate = block.norm(x, emb=temb)
    attended = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    if isinstance(block.proj_mlp, GELUProduct):
        both = block.proj_mlp(normed, attended)
    else:
        both = block.act_mlp(block.proj_mlp(normed), attended)
    x = x + gate.unsqueeze(1) * block.proj_out(both)
    text = encoder_hidden_states.shape[1]
    return x[:, :text], x[:, text:]


def _in_fp8(layer: Any) -> bool:
    """Whether a layer, in BF16, rounds its input to FP8 and multiplies by an FP8 matrix."""
    return (
        isinstance(layer, QuantLinear)
        and layer.activations == AS_STORED
        and layer.compute_dtype == torch.bfloat16
        and is_fp8_matrix(layer.weight_tensor, layer.selection.backend.name)
    )


def _share_input_scale(other: Any, layer: QuantLinear) -> None:
    """Give a layer the very tensor of `other`'s input scale if both have one value: their input is rounded once."""
    parts = other.weight_tensor.parts if isinstance(other, QuantLinear) else {}
    if "input_scale" in parts and torch.equal(parts["input_scale"], layer.get_buffer("input_scale")):
        layer.register_buffer("input_scale", parts["input_scale"])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _gelu_beside(x: Tensor, beside: Tensor | None) -> Tensor:
    y = tanh_gelu(x)
    return y if beside is None else torch.cat((beside, y), -1)


def _as_chosen() -> bool:
    """Whether neither another backend nor exact inputs are asked for, which are the layers' own affair."""
    return overrides() == (None, False)
