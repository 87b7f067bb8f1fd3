"""FLUX.1 (dev, schnell, Kontext) and every model of its architecture, the built-in one included."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mezzotint.errors import Unsupported
from mezzotint.families.family import TEXT_TOKENS, Family, Joint, Sampling, TimeEmbedding, grid
from mezzotint.families.naming import Naming
from mezzotint.families.provenance import trace
from mezzotint.families.sizes import columns, flux_blocks, holds_any
from mezzotint.families.spelling import Shapes, Spelling, holds, nunchaku

OWN_NAMES = (
    "context_embedder.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "single_transformer_blocks.0.proj_mlp.weight",
)
NORM = re.compile(r"(query_norm|key_norm)\.weight$")
CONVERTERS_WIDTH = 3072
"""Diffusers' converter splits `linear1` as if every model had this width."""


def sampling(index: Mapping[str, Any], config: Mapping[str, Any]) -> Sampling:
    """Of dev and Kontext; schnell is the one without a guidance embedder."""
    if index.get("_class_name") == "FluxKontextPipeline":
        return Sampling(size=1024, steps=28, guidance=2.5)
    if config.get("guidance_embeds", True):
        return Sampling(size=1024, steps=28, guidance=3.5)
    return Sampling(size=1024, steps=4, guidance=0.0, max_sequence_length=256)


def from_original(shapes: Shapes) -> Naming:
    """The naming of Black Forest Labs' files. Every linear of the model has a bias, quantized ones too."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    width = next(iter(shapes["img_in.weight"]), 0)
    if width == 0 or CONVERTERS_WIDTH % width:
        raise Unsupported(
            f"the model is {width} wide, and diffusers' converter for FLUX.1 can only be used where the width "
            f"divides {CONVERTERS_WIDTH}",
            "save the model with diffusers' names.",
        )
    stored = {_norm_scale(name, shapes): name for name in shapes}
    own = {known: shapes[name] for known, name in stored.items()}
    weights = [name for name in own if name.endswith(".weight")]
    biases: Shapes = {f"{name.removesuffix('.weight')}.bias": own[name][:1] for name in weights}
    naming = trace(convert_flux_transformer_checkpoint_to_diffusers, {**biases, **own}, CONVERTERS_WIDTH // width)
    return {
        name: [replace(piece, source=stored[piece.source]) for piece in pieces]
        for name, pieces in naming.items()
        if pieces[0].source in stored
    }


def _norm_scale(name: str, shapes: Shapes) -> str:
    """What the converter calls a norm of queries or keys: ComfyUI saves `query_norm.scale` as `query_norm.weight`."""
    known = NORM.sub(r"\1.scale", name)
    return name if known in shapes else known


def config(shapes: Shapes) -> dict[str, Any]:
    return {
        **flux_blocks(shapes),
        "pooled_projection_dim": columns(shapes, "time_text_embed.text_embedder.linear_1.weight"),
        "guidance_embeds": holds_any(shapes, "time_text_embed.guidance_embedder."),
    }


def example(config: Mapping[str, Any], sampling: Sampling, batch: int) -> dict[str, Any]:
    ids = grid(sampling.size // 16, (sampling.width or sampling.size) // 16, 3)
    inputs = {
        "hidden_states": torch.randn(batch, len(ids), config["in_channels"]),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }
    return inputs | ({"guidance": torch.full((batch,), 3.5)} if config["guidance_embeds"] else {})


FAMILY = Family(
    name="flux1",
    title="FLUX.1",
    transformer="FluxTransformer2DModel",
    spellings=(
        nunchaku("flux1", *OWN_NAMES),
        Spelling(holds(*OWN_NAMES)),
        Spelling(
            holds("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "double_blocks.0.img_mod.lin.weight"),
            from_original,
        ),
    ),
    sampling=sampling,
    joints=(
        Joint("joint_attention_dim", "text_encoder_2", "d_model"),
        Joint("pooled_projection_dim", "text_encoder", "hidden_size"),
        Joint(("out_channels", "in_channels"), "vae", "latent_channels", 4),
    ),
    example=example,
    config=config,
    together=(
        ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    modulation=("norm.linear", "norm1.linear", "norm1_context.linear"),
    embedding=TimeEmbedding("time_text_embed", ("timestep", "guidance", "pooled_projections")),
)
