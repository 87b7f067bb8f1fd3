"""A layer, the GELU behind it and the rounding of the next layer's input as one product, which writes FP8.

In BF16 what a feed-forward layer hands on goes through memory three times: written by the product, read by the GELU,
which rounds it, and read again. The product's own last instructions can do all of that.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.kernels import AS_STORED, Target
from mezzotint.kernels.cublaslt import missing
from mezzotint.kernels.products import round_input, rounded_product
from mezzotint.kernels.static_fp8 import has_static_fp8, static_fp8, static_input_scale
from mezzotint.nn import QuantLinear, overrides
from mezzotint.speed.activations import tanh_gelu


class GELUProduct(nn.Module):
    """A linear layer and GELU behind it; what comes out is in FP8, as the next layer reads it.

    While another backend or exact inputs are asked for (`use_backend`, `unrounded_inputs`), the layer and a GELU in
    the dtype of the input.

    following   the layer that reads the result
    """

    inverse: Tensor

    def __init__(self, layer: QuantLinear, following: QuantLinear) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("inverse", 1 / static_input_scale(following.weight_tensor), persistent=False)

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """x [..., in] to [..., out]; with `beside` [..., any] to its left, likewise rounded."""
        if not _as_chosen():
            y = tanh_gelu(self.layer(x))
            return y if beside is None else torch.cat((beside, y), -1)
        codes, weight_scale, input_scale = static_fp8(self.layer.weight_tensor)
        rows, _scale = round_input(x.reshape(-1, x.shape[-1]), input_scale)
        left = None if beside is None else beside.reshape(-1, beside.shape[-1])
        product: Tensor = torch.ops.mezzotint.gelu_product(
            rows, codes, self.layer.bias, input_scale, weight_scale, self.inverse, left
        )
        return product.reshape(*x.shape[:-1], -1)


class RoundedLinear(nn.Module):
    """The layer behind a GELUProduct: an input in FP8 is multiplied as it is, any other by the layer itself."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float8_e4m3fn:
            own: Tensor = self.layer(x)
            return own
        codes, weight_scale, input_scale = static_fp8(self.layer.weight_tensor)
        rows, scale = x.reshape(-1, x.shape[-1]), input_scale.reshape(1, 1)
        y = rounded_product(rows, scale, codes, weight_scale, self.layer.bias, self.layer.compute_dtype)
        return y.reshape(*x.shape[:-1], -1)


def replace_gelu_products(model: nn.Module, target: Target) -> int:
    """Do so wherever both layers multiply in FP8 with static scales, on a GPU that can; returns how often."""
    if missing(target) is not None:
        return 0
    count = 0
    for module in list(model.modules()):
        if type(module).__name__ == "FeedForward":
            count += _in_feed_forward(module)
        if type(module).__name__ == "FluxSingleTransformerBlock":
            count += _in_single_block(module)
    return count


def _in_feed_forward(module: Any) -> bool:
    """diffusers' FeedForward: a GELU that owns its layer, dropout, a layer."""
    first, last = module.net[0], module.net[-1]
    if getattr(first, "approximate", None) != "tanh" or not _static(first.proj, last):
        return False
    module.net = nn.ModuleList([GELUProduct(first.proj, last), RoundedLinear(last)])
    return True


def _in_single_block(block: Any) -> bool:
    """FLUX.1's, where attention and feed-forward are side by side between two products."""
    if not _static(block.proj_mlp, block.proj_out):
        return False
    block.proj_mlp = GELUProduct(_with_input_of(block.attn.to_q, block.proj_mlp), block.proj_out)
    block.act_mlp = nn.Identity()
    block.proj_out = RoundedLinear(block.proj_out)
    block.forward = MethodType(_single_block, block)
    return True


def _single_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FluxSingleTransformerBlock's forward, with the attention's result handed to the product that it stands beside."""
    x = torch.cat((encoder_hidden_states, hidden_states), 1)
    normed, gate = block.norm(x, emb=temb)
    attended = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x = x + gate.unsqueeze(1) * block.proj_out(block.proj_mlp(normed, attended))
    text = encoder_hidden_states.shape[1]
    return x[:, :text], x[:, text:]


def _static(*layers: Any) -> bool:
    """Whether all are layers in BF16 that multiply in FP8 with one scale for the matrix and one for the input."""
    return all(
        isinstance(layer, QuantLinear)
        and layer.activations == AS_STORED
        and layer.compute_dtype == torch.bfloat16
        and has_static_fp8(layer.weight_tensor, layer.selection.backend.name)
        for layer in layers
    )


def _with_input_of(other: Any, layer: QuantLinear) -> QuantLinear:
    """The layer, with the very tensor of `other`'s input scale if both have one value: their input is rounded once."""
    parts = other.weight_tensor.parts if isinstance(other, QuantLinear) else {}
    if "input_scale" in parts and torch.equal(parts["input_scale"], layer.get_buffer("input_scale")):
        layer.register_buffer("input_scale", parts["input_scale"])
    return layer


def _as_chosen() -> bool:
    return overrides() == (None, False)
