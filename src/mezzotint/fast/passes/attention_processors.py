"""Attention processors that normalize and rotate queries and keys in one kernel.

Each replaces the diffusers processor of the same layer and computes the same function. Diffusers
has norm and rotation as separate operations, so queries and keys pass through memory several times.
Qwen-Image and Z-Image use complex numbers, which Inductor cannot fuse.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mezzotint.families.recipe import Recipe
from mezzotint.fast.edits import ModelEdits
from mezzotint.fast.fast_pass import Applied, Pass, PassContext, Skipped, recipe_of
from mezzotint.fast.fused_layers import (
    ColumnSlice,
    FusedActivationLinear,
    computes_in_fp8,
    fp8_gemm_operands,
)
from mezzotint.fast.passes.attention import AttentionBackend, FastAttnProcessor
from mezzotint.nn import FusedLinearSlice, QuantLinear


class HeadNorm(Protocol):
    """An RMS norm of the heads of queries or keys."""

    weight: Tensor
    eps: float


class AttentionLayer(Protocol):
    """What every processor reads of an attention layer of diffusers."""

    norm_q: HeadNorm
    norm_k: HeadNorm


class JointAttentionLayer(AttentionLayer, Protocol):
    """Attention of text and image. The last six attributes are read only with separate text."""

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList
    add_q_proj: nn.Module
    add_k_proj: nn.Module
    add_v_proj: nn.Module
    to_add_out: nn.Module
    norm_added_q: HeadNorm
    norm_added_k: HeadNorm


class ParallelAttentionLayer(AttentionLayer, Protocol):
    """Attention and feed-forward between two linears."""

    inner_dim: int
    to_qkv_mlp_proj: nn.Module
    mlp_act_fn: nn.Module
    to_out: nn.Module


CosSin = tuple[Tensor, Tensor]
"""cos and sin of the angle of each token and pair, float32 [1 or batch, tokens, width / 2]."""


class JointAttnProcessor(FastAttnProcessor):
    """Joint attention of text and image. Z-Image has one stream, and calls it without text."""

    def __call__(
        self,
        attn: JointAttentionLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Any:
        text = encoder_hidden_states
        mask = _joint_mask(attention_mask, encoder_hidden_states_mask, hidden_states)
        angles = _cos_sin(image_rotary_emb if freqs_cis is None else freqs_cis)
        qkv = _qkv(attn, hidden_states, text)
        if text is None:
            out = _attention(self.attention, attn, qkv, angles, mask)
            # FLUX.1's single blocks project the output themselves.
            return attn.to_out[0](out) if hasattr(attn, "to_out") else out
        text_tokens, text_norms = text.shape[1], (attn.norm_added_q, attn.norm_added_k)
        out = _attention(self.attention, attn, qkv, angles, mask, text_tokens, text_norms)
        return attn.to_out[0](out[:, text_tokens:]), attn.to_add_out(out[:, :text_tokens])


class ParallelAttnProcessor(FastAttnProcessor):
    """FLUX.2's single blocks: attention and feed-forward in parallel, between two linears."""

    def __call__(
        self,
        attn: ParallelAttentionLayer,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        linear, angles = attn.to_qkv_mlp_proj, _cos_sin(image_rotary_emb)
        mlp: Any
        if isinstance(linear, FusedActivationLinear):
            qkv, mlp = linear.split(hidden_states, attn.inner_dim)
            out = _attention(self.attention, attn, qkv, angles, attention_mask)
            fused: Tensor = attn.to_out(linear.write_prefix(out, mlp))
            return fused
        qkv_mlp, width = linear(hidden_states), 3 * attn.inner_dim
        qkv, mlp = qkv_mlp[..., :width], attn.mlp_act_fn(qkv_mlp[..., width:])
        out = _attention(self.attention, attn, qkv, angles, attention_mask)
        output: Tensor = attn.to_out(torch.cat((out, mlp), -1))
        return output


PROCESSORS: Mapping[str, Callable[[AttentionBackend], Any]] = {
    "joint": JointAttnProcessor,
    "parallel": ParallelAttnProcessor,
}
"""{kind in Recipe.attn_processors: our processor}"""


def replace_attn_processors(
    model: nn.Module,
    attention: AttentionBackend,
    recipe: Recipe | None = None,
    edits: ModelEdits | None = None,
) -> int:
    """Replace the processors that a recipe names by ours, in a model on a GPU. Return how many.

    recipe   recipe of the family; by default that of the model's class
    """
    importlib.import_module("mezzotint.kernels.ops.norm_rope.op")
    importlib.import_module("mezzotint.kernels.ops.joint_fp8_gemm.op")
    edits = edits or ModelEdits()
    kinds = (recipe or recipe_of(model)).attn_processors
    layers: list[Any] = [
        layer
        for layer in model.modules()
        if type(getattr(layer, "processor", None)).__name__ in kinds
    ]
    for layer in layers:
        kind = kinds[type(layer.processor).__name__]
        edits.set(layer, processor=PROCESSORS[kind](attention))
    return len(layers)


def _qkv(attn: JointAttentionLayer, image_states: Tensor, text: Tensor | None) -> Tensor:
    """Return queries, keys and values [batch, text and image tokens, 3 * width]."""
    if text is not None and (joint := _joint_qkv_layers(attn)):
        return _joint_qkv_gemm(joint, text, image_states)
    image_qkv = _concat_outputs((attn.to_q, attn.to_k, attn.to_v), image_states)
    if text is None:
        return image_qkv
    text_qkv = _concat_outputs((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), text)
    return torch.cat((text_qkv, image_qkv), 1)


def _joint_qkv_layers(attn: JointAttentionLayer) -> list[QuantLinear]:
    """Return the fused q, k, v layers of text and image if both are FP8, else an empty list."""
    layers = [
        layer.fused.linear
        for layer in (getattr(attn, "add_q_proj", None), attn.to_q)
        if isinstance(layer, FusedLinearSlice)
        and layer.index == 0  # the whole group is q, k and v, and nothing else
        and len(layer.fused.split_sizes) == 3
    ]
    return layers if len(layers) == 2 and all(computes_in_fp8(layer) for layer in layers) else []


def _joint_qkv_gemm(layers: Sequence[QuantLinear], text: Tensor, image: Tensor) -> Tensor:
    """Return queries, keys and values [batch, text and image tokens, 3 * width].

    Both GEMMs write into one tensor, which saves the copy of torch.cat.
    """
    operands: list[Any] = []
    for layer, x in zip(layers, (text, image), strict=True):
        x_quantized, *rest = fp8_gemm_operands(layer, x)
        operands += [x_quantized.view(x.shape), *rest]
    out: Tensor = torch.ops.mezzotint.joint_fp8_gemm(*operands)
    return out


def _concat_outputs(layers: Sequence[Any], x: Tensor) -> Tensor:
    """Concatenate the outputs of layers along the last axis, without a copy if they are fused."""
    first = layers[0]
    if isinstance(first, FusedLinearSlice) and all(
        isinstance(layer, FusedLinearSlice)
        and layer.fused is first.fused
        and layer.index == first.index + offset
        for offset, layer in enumerate(layers)
    ):
        return first.fused.slice_output(x, first.index, len(layers))
    if isinstance(first, ColumnSlice):
        # x is the output of the fused layer already; see `flux1_single_stream_forward`.
        return x[..., first.start : first.start + sum(layer.out_features for layer in layers)]
    return torch.cat([layer(x) for layer in layers], -1)


def _cos_sin(rotary: Any) -> CosSin:
    """Return cos and sin from what a family's position embedder returns.

    That is complex numbers in Z-Image, a pair of complex numbers for image and text in Qwen-Image,
    and (cos, sin) with each value twice in FLUX.
    """
    if isinstance(rotary, Tensor):
        pair = torch.view_as_real(rotary)
        return pair[..., 0], pair[..., 1]
    first, second = rotary
    if first.is_complex():
        # Qwen-Image returns the image's angles first, but its text tokens come first.
        pair = torch.view_as_real(torch.cat((second, first)))[None]
        return pair[..., 0], pair[..., 1]
    return first[None, :, 0::2], second[None, :, 0::2]


def _use_fp8(attention: AttentionBackend, mask: Tensor | None) -> bool:
    return attention.accepts_fp8 and mask is None


def _attention(
    attention: AttentionBackend,
    attn: AttentionLayer,
    qkv: Tensor,
    angles: CosSin,
    mask: Tensor | None,
    text_tokens: int = 0,
    text_norms: tuple[HeadNorm, HeadNorm] | None = None,
) -> Tensor:
    """Return the attention [batch, tokens, width] of qkv [batch, tokens, 3 * width].

    text_tokens   number of tokens, from the first, that have the text's norm weights
    text_norms    norms of the text's queries and keys, if it has its own
    """
    states = qkv.view(*qkv.shape[:-1], -1, attn.norm_q.weight.shape[0])
    heads = states.shape[2] // 3
    text_weights = [norm.weight for norm in text_norms] if text_norms else [None, None]
    rotated = torch.ops.mezzotint.norm_rope(
        states[:, :, : 2 * heads],
        attn.norm_q.weight,
        attn.norm_k.weight,
        *text_weights,
        text_tokens,
        *angles,
        attn.norm_q.eps,
        _use_fp8(attention, mask),
    )
    q, k = rotated.chunk(2, 2)
    return attention.run(q, k, states[:, :, 2 * heads :], mask, None).flatten(2)


def _joint_mask(mask: Tensor | None, text_mask: Tensor | None, image: Tensor) -> Tensor | None:
    """Return the mask of all tokens [batch, 1, 1, tokens], or None if none is masked."""
    if text_mask is not None:
        image_mask = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        mask = torch.cat((text_mask, image_mask), 1)
    return mask[:, None, None, :] if mask is not None and mask.ndim == 2 else mask


class AttentionProcessorsPass(Pass):
    """Replace the attention processors that the recipe names."""

    name = "attention_processors"
    # Ours call the selected backend themselves. Fusing activations looks at diffusers' processors.
    after = ("attention", "fused_activation")

    def apply(self, model: nn.Module, context: PassContext) -> Applied | Skipped:
        attention = context.attention_backend
        assert isinstance(attention, AttentionBackend)  # noqa: S101, set by the pass `attention`
        count = replace_attn_processors(model, attention, context.family.fast, context.edits)
        if not count:
            return Skipped("the family has no attention processors that are replaced")
        return Applied({"fused_attention": count})


PASS = AttentionProcessorsPass()
