"""Fuse activations with the linear layers around them, where the next layer reads FP8 or INT8.

Feed-forward modules have one activation between two linears. Single blocks have attention and
feed-forward in parallel between two linears, so their first linear also makes queries, keys and
values.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import accumulate
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.errors import ShapeMismatch
from mezzotint.families.recipe import Recipe
from mezzotint.fast.edits import ModelEdits
from mezzotint.fast.fast_pass import Applied, Pass, PassContext, recipe_of
from mezzotint.fast.fused_layers import (
    ActivationQuantize,
    ColumnSlice,
    FusedActivationLinear,
    QuantizedActivation,
    QuantizedInputLinear,
    SplitQuantizedInputLinear,
    is_fp8_linear,
    is_int8_linear,
    quantizes_per_row,
)
from mezzotint.fast.passes.attention_processors import ParallelAttnProcessor
from mezzotint.fast.passes.fuse_linears import fuse_with_undo
from mezzotint.kernels import Target
from mezzotint.kernels.ops.gemm_act.op import unavailable_reason
from mezzotint.nn import QuantLinear, SplitLinear


class FusionOutcome(Enum):
    """What became of an activation and the linears around it."""

    FUSED = "the activation is fused"
    UNSUPPORTED_DEVICE = "the activation could be fused on another device"
    UNSUPPORTED_LAYERS = "the linears read neither FP8 nor INT8, or in no form that can be fused"


def fuse_activations(
    model: nn.Module,
    target: Target,
    recipe: Recipe | None = None,
    edits: ModelEdits | None = None,
) -> tuple[int, str | None]:
    """Fuse activations wherever the layer after them quantizes its input, in a model on a GPU.

    recipe   recipe of the family; by default that of the model's class
    Returns  how many were fused, and why the rest was not if `target` is the reason
    """
    importlib.import_module("mezzotint.kernels.ops.quantize_activation.op")
    edits = edits or ModelEdits()
    rewrites = (recipe or recipe_of(model)).rewrites
    reason = unavailable_reason(target)
    outcomes = [
        REWRITES[rewrites[type(module).__name__].kind](module, reason is None, edits)
        for module in list(model.modules())
        if type(module).__name__ in rewrites
    ]
    blocked = FusionOutcome.UNSUPPORTED_DEVICE in outcomes
    return outcomes.count(FusionOutcome.FUSED), reason if blocked else None


def _gelu_feed_forward(module: Any, can_fuse: bool, edits: ModelEdits) -> FusionOutcome:
    """Rewrite diffusers' FeedForward: a GELU that contains its linear, a dropout, a linear."""
    # net[1] is a dropout, which does nothing in inference. Our kernels compute the tanh
    # approximation of GELU only.
    first, last = module.net[0], module.net[-1]
    if getattr(first, "approximate", None) != "tanh":
        return FusionOutcome.UNSUPPORTED_LAYERS
    # The scale of a row needs the whole row, and a tile of the GEMM has only a part of it.
    if quantizes_per_row(last):
        layers = [first.proj, ActivationQuantize("gelu", last), QuantizedInputLinear(last)]
        edits.set(module, net=nn.ModuleList(layers))
        return FusionOutcome.FUSED
    if not (is_fp8_linear(first.proj) and is_fp8_linear(last)):
        return FusionOutcome.UNSUPPORTED_LAYERS
    if not can_fuse:
        return FusionOutcome.UNSUPPORTED_DEVICE
    fused = FusedActivationLinear(first.proj, last, "gelu")
    edits.set(module, net=nn.ModuleList([fused, QuantizedInputLinear(last)]))
    return FusionOutcome.FUSED


def _packed_swiglu(module: Any, can_fuse: bool, edits: ModelEdits) -> FusionOutcome:
    """Rewrite FLUX.2's feed-forward, whose gate and up projections are one linear."""
    first, last = module.linear_in, module.linear_out
    if quantizes_per_row(last):
        activation = ActivationQuantize("swiglu", last)
        edits.set(module, act_fn=activation, linear_out=QuantizedInputLinear(last))
        return FusionOutcome.FUSED
    if not (is_fp8_linear(first) and is_fp8_linear(last)):
        return FusionOutcome.UNSUPPORTED_LAYERS
    if not can_fuse:
        return FusionOutcome.UNSUPPORTED_DEVICE
    edits.set(
        module,
        linear_in=FusedActivationLinear(first, last, "swiglu"),
        act_fn=nn.Identity(),  # diffusers' forward calls it between the linears
        linear_out=QuantizedInputLinear(last),
    )
    return FusionOutcome.FUSED


def _parallel_attention(attn: Any, can_fuse: bool, edits: ModelEdits) -> FusionOutcome:
    """Rewrite FLUX.2's parallel attention, where one linear makes q, k, v, gate and up.

    Only ParallelAttnProcessor understands the result, so the processor must be it or be replaced by
    it.
    """
    first, last = attn.to_qkv_mlp_proj, attn.to_out
    replaceable = type(attn.processor).__name__ == "Flux2ParallelSelfAttnProcessor"
    if not (replaceable or isinstance(attn.processor, ParallelAttnProcessor)):
        return FusionOutcome.UNSUPPORTED_LAYERS
    if not (is_fp8_linear(first) and is_fp8_linear(last)) or quantizes_per_row(last):
        return FusionOutcome.UNSUPPORTED_LAYERS
    if not can_fuse:
        return FusionOutcome.UNSUPPORTED_DEVICE
    fused = FusedActivationLinear(first, last, "swiglu", 3 * attn.inner_dim)
    edits.set(attn, to_qkv_mlp_proj=fused, to_out=QuantizedInputLinear(last))
    return FusionOutcome.FUSED


def _split_swiglu(module: Any, can_fuse: bool, edits: ModelEdits) -> FusionOutcome:
    """Rewrite Z-Image's feed-forward, whose gate w1 and up w3 are separate linears."""
    last = module.w2
    per_row = quantizes_per_row(last)
    if not (per_row or is_fp8_linear(last)):
        return FusionOutcome.UNSUPPORTED_LAYERS
    if not (per_row or can_fuse):
        return FusionOutcome.UNSUPPORTED_DEVICE
    # The kernels expect the gate before up.
    split = _try_fuse_layers([module.w1, module.w3])
    if split is None:
        return FusionOutcome.UNSUPPORTED_LAYERS
    linear, originals = split
    fused = (
        nn.Sequential(linear, ActivationQuantize("swiglu", last))
        if per_row
        else FusedActivationLinear(linear, last, "swiglu")
    )
    # diffusers' forward is w2(_forward_silu_gating(w1(x), w3(x))). So w1 returns the result, and
    # the gating passes it on.
    for name, layer, original in zip(("w1", "w3"), (fused, nn.Identity()), originals, strict=True):
        edits.replace_layer(module, name, layer, original)
    edits.set(module, _forward_silu_gating=_pass_quantized, w2=QuantizedInputLinear(last))
    return FusionOutcome.FUSED


def _pass_quantized(quantized: QuantizedActivation, _x: Tensor) -> QuantizedActivation:
    """Replace the gating of w1's and w3's outputs: the first holds the result, the second x."""
    return quantized


def _flux1_single_block(block: Any, can_fuse: bool, edits: ModelEdits) -> FusionOutcome:
    """Rewrite FLUX.1's single block: attention and feed-forward in parallel between linears."""
    last = block.proj_out
    if isinstance(last, SplitLinear):
        return _flux1_split_single_block(block, last, edits)
    # proj_out reads attention and MLP as one row. With a scale per row, quantizing needs both;
    # with a static scale, the MLP's part is quantized before attention has run.
    if quantizes_per_row(last):
        edits.set(block, act_mlp=ActivationQuantize("gelu", last))
    elif not (is_fp8_linear(block.proj_mlp) and is_fp8_linear(last)):
        return FusionOutcome.UNSUPPORTED_LAYERS
    elif not can_fuse:
        return FusionOutcome.UNSUPPORTED_DEVICE
    else:
        _fuse_qkv_and_mlp(block, last, edits)
    forward = MethodType(flux1_single_block_forward, block)
    edits.set(block, proj_out=QuantizedInputLinear(last), forward=forward)
    return FusionOutcome.FUSED


def _flux1_split_single_block(block: Any, last: SplitLinear, edits: ModelEdits) -> FusionOutcome:
    """Rewrite a single block whose `proj_out` is stored in two pieces, for attention and for MLP.

    Each piece has its own row scales, so their inputs need not be one tensor.
    """
    _attention, *rest = last.sublayers
    if [piece.in_features for piece in rest] != [block.mlp_hidden_dim]:
        return FusionOutcome.UNSUPPORTED_LAYERS
    if not quantizes_per_row(rest[0]):
        return FusionOutcome.UNSUPPORTED_LAYERS
    edits.set(
        block,
        act_mlp=ActivationQuantize("gelu", rest[0]),
        proj_out=SplitQuantizedInputLinear(last),
        forward=MethodType(flux1_single_block_forward, block),
    )
    return FusionOutcome.FUSED


def _fuse_qkv_and_mlp(block: Any, last: QuantLinear, edits: ModelEdits) -> None:
    """Fuse proj_mlp with its activation, and with q, k and v if they can be one layer."""
    attn = block.attn
    layers = [attn.to_q, attn.to_k, attn.to_v, block.proj_mlp]
    # Layers with different static input scales cannot be fused. Then only the MLP is.
    split = _try_fuse_layers(layers)
    if split is None:
        edits.set(block, proj_mlp=FusedActivationLinear(block.proj_mlp, last, "gelu"))
        return
    # One launch for q, k, v and the MLP: they read the same quantized input.
    linear, originals = split
    *widths, _mlp_width = (layer.out_features for layer in layers)
    starts = accumulate(widths, initial=0)
    fused = FusedActivationLinear(linear, last, "gelu", sum(widths))
    slices = [ColumnSlice(start, width) for start, width in zip(starts, widths, strict=False)]
    paths = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    for path, layer, original in zip(paths, (*slices, fused), originals, strict=True):
        edits.replace_layer(block, path, layer, original)


REWRITES: Mapping[str, Callable[[Any, bool, ModelEdits], FusionOutcome]] = {
    "gelu": _gelu_feed_forward,
    "packed_swiglu": _packed_swiglu,
    "split_swiglu": _split_swiglu,
    "parallel_attention": _parallel_attention,
    "flux1_single_block": _flux1_single_block,
}
"""{kind of Rewrite: function of the module, of whether the GEMM can contain the activation here,
and of the undo log}"""


def flux1_single_block_forward(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Replace FluxSingleTransformerBlock.forward, which keeps text and image separate."""
    text_tokens = encoder_hidden_states.shape[1]
    x = torch.cat((encoder_hidden_states, hidden_states), 1)
    x = flux1_single_stream_forward(block, x, *args, **kwargs)
    return x[:, :text_tokens], x[:, text_tokens:]


def flux1_single_stream_forward(
    block: Any,
    x: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """Run FLUX.1's single block on x [batch, text and image tokens, width].

    If q, k, v and the MLP are one layer, attention gets its columns; otherwise it gets the normed
    x.
    """
    normed, gate = block.norm(x, emb=temb)
    linear = block.proj_mlp
    if isinstance(linear, FusedActivationLinear):
        qkv, mlp = linear.split(normed, normed.shape[-1])
        attn_input = qkv if linear.plain_columns else normed
    else:
        attn_input, mlp = normed, linear(normed)
    attn_output = block.attn(
        hidden_states=attn_input,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    output: Tensor = x + gate.unsqueeze(1) * _project_out(block, attn_output, mlp)
    return output


def _project_out(block: Any, attn_output: Tensor, mlp: Tensor | QuantizedActivation) -> Tensor:
    """Apply `proj_out` to attention and MLP. The MLP's GELU is applied already if it was fused."""
    if isinstance(block.proj_out, SplitQuantizedInputLinear):
        inputs: tuple[Any, ...] = attn_output, block.act_mlp(mlp)
    elif isinstance(block.proj_mlp, FusedActivationLinear):
        inputs = (block.proj_mlp.write_prefix(attn_output, mlp),)
    else:
        inputs = (block.act_mlp(mlp, attn_output),)
    output: Tensor = block.proj_out(*inputs)
    return output


def _try_fuse_layers(
    layers: Sequence[Any],
) -> tuple[QuantLinear, list[Callable[[], QuantLinear]]] | None:
    """Fuse FP8 or INT8 layers that read the same input, or return None. See `fuse_with_undo`."""
    if not any(all(map(kind, layers)) for kind in (is_fp8_linear, is_int8_linear)):
        return None
    try:
        return fuse_with_undo(layers)
    except ShapeMismatch:
        return None


class FusedActivationPass(Pass):
    """Fuse activations of the modules that the recipe names."""

    name = "fused_activation"

    def apply(self, model: nn.Module, context: PassContext) -> Applied:
        fused, reason = fuse_activations(model, context.target, context.family.fast, context.edits)
        return Applied({"fused_activations": fused, "activation_fusion_skipped": reason})


PASS = FusedActivationPass()
