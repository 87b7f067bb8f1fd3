"""FLUX.1 (dev, schnell, Kontext) and every model of its architecture, the built-in one included."""

import re
from dataclasses import replace
from typing import Any

import torch

from mezzotint.errors import Unsupported
from mezzotint.families.converter_trace import trace_converter
from mezzotint.families.example_inputs import EXAMPLE_TEXT_TOKENS, packed_size, position_ids
from mezzotint.families.family import (
    BENCH_IMAGE,
    Config,
    Family,
    Joint,
    PublishedModel,
    SourceImagePipeline,
    TimeEmbedding,
)
from mezzotint.families.naming import Naming
from mezzotint.families.naming_scheme import (
    NamingScheme,
    Shapes,
    has_tensors,
    nunchaku_naming_scheme,
)
from mezzotint.families.nunchaku_names import (
    HIDDEN,
    WIDTH,
    BlockTable,
    FusedTargets,
    NunchakuNames,
    norm,
    same_name,
)
from mezzotint.families.recipe import GELU_FEED_FORWARD, Recipe, ResidualBlock, Rewrite
from mezzotint.families.sampling import Sampling
from mezzotint.families.sizes import columns, flux_blocks, holds_any

TRANSFORMER = "FluxTransformer2DModel"
DIFFUSERS_NAMES = (
    "context_embedder.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "single_transformer_blocks.0.proj_mlp.weight",
)

NORM = re.compile(r"(query_norm|key_norm)\.weight$")
CONVERTER_WIDTH = 3072
"""Diffusers' converter splits `linear1` as if every model had this width."""


def sampling(index: Config, config: Config) -> Sampling:
    """Return the settings of dev or Kontext, or of schnell: it has no guidance embedder."""
    if index.get("_class_name") == "FluxKontextPipeline":
        return Sampling(height=1024, steps=28, guidance=2.5)
    if config.get("guidance_embeds", True):
        return Sampling(height=1024, steps=28, guidance=3.5)
    return Sampling(height=1024, steps=4, guidance=0.0, max_sequence_length=256)


def from_original(shapes: Shapes) -> Naming:
    """Return the naming of Black Forest Labs' files.

    Every linear of the model has a bias, and the converter requires all of them. Quantized files
    may lack some, so the trace adds a bias to each weight and drops those that the file lacks.
    """
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    stored = {_converter_name(name, shapes): name for name in shapes}
    known = {name: shapes[file_name] for name, file_name in stored.items()}
    weights = [name for name in known if name.endswith(".weight")]
    biases: Shapes = {f"{name.removesuffix('.weight')}.bias": known[name][:1] for name in weights}
    naming = trace_converter(
        convert_flux_transformer_checkpoint_to_diffusers, {**biases, **known}, _repeat(shapes)
    )
    return {
        name: [replace(piece, source=stored[piece.source]) for piece in pieces]
        for name, pieces in naming.items()
        if pieces[0].source in stored
    }


def _repeat(shapes: Shapes) -> int:
    """Return how often to repeat each row so that the model is as wide as the converter expects."""
    width = next(iter(shapes["img_in.weight"]), 0)
    if width == 0 or CONVERTER_WIDTH % width:
        raise Unsupported(
            f"the model is {width} wide, and diffusers' converter for FLUX.1 can only be used if "
            f"the width divides {CONVERTER_WIDTH}",
            "save the model with diffusers' names.",
        )
    return CONVERTER_WIDTH // width


def _converter_name(name: str, shapes: Shapes) -> str:
    """Return the converter's name: ComfyUI saves the norms' `query_norm.scale` as `.weight`."""
    scale = NORM.sub(r"\1.scale", name)
    return name if scale in shapes else scale


def config(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of the model that has these tensors."""
    return {
        **flux_blocks(shapes),
        "pooled_projection_dim": columns(shapes, "time_text_embed.text_embedder.linear_1.weight"),
        "guidance_embeds": holds_any(shapes, "time_text_embed.guidance_embedder."),
    }


def example(config: Config, sampling: Sampling, batch: int) -> dict[str, Any]:
    """Return random arguments of one call of the transformer."""
    ids = position_ids(*packed_size(sampling), axes=3)
    inputs = {
        "hidden_states": torch.randn(batch, len(ids), config["in_channels"]),
        "encoder_hidden_states": torch.randn(
            batch, EXAMPLE_TEXT_TOKENS, config["joint_attention_dim"]
        ),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(EXAMPLE_TEXT_TOKENS, 3),
    }
    return inputs | ({"guidance": torch.full((batch,), 3.5)} if config["guidance_embeds"] else {})


def hidden(width: int) -> int:
    """Return the features inside a feed-forward."""
    return 4 * width


QKV = FusedTargets(("attn.to_q", "attn.to_k", "attn.to_v"))
ADDED_QKV = FusedTargets(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))
DOUBLE_BLOCK = {
    "qkv_proj": QKV,
    "attn.to_qkv": QKV,
    "qkv_proj_context": ADDED_QKV,
    "attn.add_qkv_proj": ADDED_QKV,
    "out_proj": FusedTargets(("attn.to_out.0",)),
    "out_proj_context": FusedTargets(("attn.to_add_out",)),
    "mlp_fc1": FusedTargets(("ff.net.0.proj",), HIDDEN),
    "mlp_fc2": FusedTargets(("ff.net.2",), WIDTH, HIDDEN),
    "mlp_context_fc1": FusedTargets(("ff_context.net.0.proj",), HIDDEN),
    "mlp_context_fc2": FusedTargets(("ff_context.net.2",), WIDTH, HIDDEN),
    **same_name("attn.to_out.0"),
    **same_name("attn.to_add_out"),
    **same_name("ff.net.0.proj", HIDDEN),
    **same_name("ff.net.2", WIDTH, HIDDEN),
    **same_name("ff_context.net.0.proj", HIDDEN),
    **same_name("ff_context.net.2", WIDTH, HIDDEN),
    **norm("norm_q", "attn.norm_q"),
    **norm("norm_k", "attn.norm_k"),
    **norm("norm_added_q", "attn.norm_added_q"),
    **norm("norm_added_k", "attn.norm_added_k"),
    **norm("attn.norm_q", "attn.norm_q"),
    **norm("attn.norm_k", "attn.norm_k"),
    **norm("attn.norm_added_q", "attn.norm_added_q"),
    **norm("attn.norm_added_k", "attn.norm_added_k"),
}
SINGLE_BLOCK = {
    "qkv_proj": QKV,
    "attn.to_qkv": QKV,
    "mlp_fc1": FusedTargets(("proj_mlp",), HIDDEN),
    "out_proj": FusedTargets(("proj_out",)),
    "attn.to_out": FusedTargets(("proj_out",)),
    "mlp_fc2": FusedTargets(("proj_out",), WIDTH, HIDDEN),
    **norm("norm_q", "attn.norm_q"),
    **norm("norm_k", "attn.norm_k"),
    **norm("attn.norm_q", "attn.norm_q"),
    **norm("attn.norm_k", "attn.norm_k"),
}
NUNCHAKU = NunchakuNames(
    blocks=(
        BlockTable(
            re.compile(r"transformer_blocks\.\d+"), DOUBLE_BLOCK, "x_embedder.weight", hidden
        ),
        BlockTable(
            re.compile(r"single_transformer_blocks\.\d+"), SINGLE_BLOCK, "x_embedder.weight", hidden
        ),
    ),
    awq=("norm1.linear", "norm1_context.linear", "norm.linear"),
    model_class="NunchakuFluxTransformer2dModel",
    v1=True,
)


FAST = Recipe(
    attn_processors={"FluxAttnProcessor": "joint"},
    feed_forward=GELU_FEED_FORWARD,
    single_block=Rewrite(
        "FluxSingleTransformerBlock",
        "flux1_single_block",
        ("norm", "attn", "proj_mlp", "act_mlp", "proj_out", "mlp_hidden_dim"),
    ),
    residual_blocks=(
        ResidualBlock("FluxTransformerBlock", ("ff", "ff_context")),
        ResidualBlock("FluxSingleTransformerBlock", ("proj_out",), needs_rewrite=True),
    ),
    final_layer="norm_out",
)


ORIGINAL_NAMES = (
    (r"^transformer_blocks\.", "double_blocks."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^x_embedder", "img_in"),
    (r"^context_embedder", "txt_in"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^time_\w+_embed\.timestep_embedder", "time_in"),
    (r"^time_\w+_embed\.guidance_embedder", "guidance_in"),
    (r"^time_\w+_embed\.text_embedder", "vector_in"),
    (r"^(\w+_in)\.linear_1", r"\1.in_layer"),
    (r"^(\w+_in)\.linear_2", r"\1.out_layer"),
    (r"\.attn\.norm_added_(q|k)\.weight", r".txt_attn.norm.\1_norm.scale"),
    (r"^(double_blocks\.\d+)\.attn\.norm_(q|k)\.weight", r"\1.img_attn.norm.\2_norm.scale"),
    (r"^(single_blocks\.\d+)\.attn\.norm_(q|k)\.weight", r"\1.norm.\2_norm.scale"),
    (r"\.q_norm\.", ".query_norm."),
    (r"\.k_norm\.", ".key_norm."),
    (r"\.attn\.add_(q|k|v)_proj\.", ".txt_attn.qkv."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"^(single_blocks\.\d+)\.(attn\.to_(q|k|v)|proj_mlp)\.", r"\1.linear1."),
    (r"^(single_blocks\.\d+)\.proj_out\.", r"\1.linear2."),
    (r"^(single_blocks\.\d+)\.norm\.linear\.", r"\1.modulation.lin."),
    (r"\.attn\.to_(q|k|v)\.", ".img_attn.qkv."),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.norm1\.linear\.", ".img_mod.lin."),
    (r"\.norm1_context\.linear\.", ".txt_mod.lin."),
    (r"\.ff\.net\.0\.proj\.", ".img_mlp.0."),
    (r"\.ff\.net\.2\.", ".img_mlp.2."),
    (r"\.ff_context\.net\.0\.proj\.", ".txt_mlp.0."),
    (r"\.ff_context\.net\.2\.", ".txt_mlp.2."),
)
"""From diffusers' names to those of Black Forest Labs."""


FAMILY = Family(
    name="flux1",
    title="FLUX.1",
    transformer_class=TRANSFORMER,
    naming_schemes=(
        nunchaku_naming_scheme(NUNCHAKU, *DIFFUSERS_NAMES),
        NamingScheme(has_tensors(*DIFFUSERS_NAMES)),
        NamingScheme(
            has_tensors(
                "img_in.weight",
                "txt_in.weight",
                "vector_in.in_layer.weight",
                "double_blocks.0.img_mod.lin.weight",
            ),
            from_original,
        ),
    ),
    sampling=sampling,
    joints=(
        Joint("joint_attention_dim", "text_encoder_2", "d_model"),
        Joint("pooled_projection_dim", "text_encoder", "hidden_size"),
        Joint(("out_channels", "in_channels"), "vae", "latent_channels", 4),
    ),
    example_inputs=example,
    config=config,
    fusable=(
        ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    modulation_layers=("norm.linear", "norm1.linear", "norm1_context.linear"),
    time_embedding=TimeEmbedding("time_text_embed", ("timestep", "guidance", "pooled_projections")),
    source_image_pipelines=(SourceImagePipeline("FluxKontext"),),
    # Found by others, who left one kind of layer in BF16 at a time.
    keep_bf16=(
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "transformer_blocks.*.ff.net.*",
        "transformer_blocks.*.ff_context.net.*",
        "single_transformer_blocks.*.norm.linear",
    ),
    nunchaku=NUNCHAKU,
    published={"flux1-dev": PublishedModel(TRANSFORMER, {"guidance_embeds": True}, BENCH_IMAGE)},
    fast=FAST,
    original_names=ORIGINAL_NAMES,
)
