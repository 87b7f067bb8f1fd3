"""FLUX.2: dev, and klein 4B and 9B."""

from typing import Any

import torch

from mezzotint.families.converter_trace import trace_converter
from mezzotint.families.example_inputs import EXAMPLE_TEXT_TOKENS, packed_size, position_ids
from mezzotint.families.family import (
    BENCH_IMAGE,
    DIFFUSERS_LAYER_PAIRS,
    Config,
    Family,
    Joint,
    PublishedModel,
    SourceImagePipeline,
)
from mezzotint.families.naming import Naming
from mezzotint.families.naming_scheme import NamingScheme, Shapes, has_tensors
from mezzotint.families.recipe import Recipe, ResidualBlock, Rewrite
from mezzotint.families.sampling import Sampling
from mezzotint.families.sizes import columns, flux_blocks, holds_any, rows

TRANSFORMER = "Flux2Transformer2DModel"


def sampling(index: Config, _config: Config) -> Sampling:
    """Return the settings of dev and base models, or of distilled klein models without guidance."""
    if index.get("is_distilled"):
        return Sampling(height=1024, steps=4, guidance=1.0)
    return Sampling(height=1024, steps=50, guidance=4.0)


def from_original(shapes: Shapes) -> Naming:
    """Return the naming of Black Forest Labs' files."""
    from diffusers.loaders.single_file_utils import (
        convert_flux2_transformer_checkpoint_to_diffusers,
    )

    return trace_converter(convert_flux2_transformer_checkpoint_to_diffusers, shapes)


def config(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of the model that has these tensors."""
    width = rows(shapes, "x_embedder.weight")
    return {
        **flux_blocks(shapes),
        "timestep_guidance_channels": columns(
            shapes, "time_guidance_embed.timestep_embedder.linear_1.weight"
        ),
        "mlp_ratio": _hidden(shapes, width) / width,
        "guidance_embeds": holds_any(shapes, "time_guidance_embed.guidance_embedder."),
    }


def _hidden(shapes: Shapes, width: int) -> int:
    """Return the features inside the MLP; a single block's last layer also reads the attention."""
    if "transformer_blocks.0.ff.linear_out.weight" in shapes:
        return columns(shapes, "transformer_blocks.0.ff.linear_out.weight")
    return columns(shapes, "single_transformer_blocks.0.attn.to_out.weight") - width


def example(config: Config, sampling: Sampling, batch: int) -> dict[str, Any]:
    """Return random arguments of one call of the transformer."""
    ids = position_ids(*packed_size(sampling), axes=4)
    inputs = {
        "hidden_states": torch.randn(batch, len(ids), config["in_channels"]),
        "encoder_hidden_states": torch.randn(
            batch, EXAMPLE_TEXT_TOKENS, config["joint_attention_dim"]
        ),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(EXAMPLE_TEXT_TOKENS, 4),
    }
    return inputs | ({"guidance": torch.full((batch,), 4.0)} if config["guidance_embeds"] else {})


KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}


FAST = Recipe(
    attn_processors={
        "Flux2AttnProcessor": "joint",
        "Flux2ParallelSelfAttnProcessor": "parallel",
    },
    feed_forward=Rewrite(
        "Flux2FeedForward", "packed_swiglu", ("linear_in", "act_fn", "linear_out")
    ),
    single_block=Rewrite(
        "Flux2ParallelSelfAttention",
        "parallel_attention",
        ("to_qkv_mlp_proj", "mlp_act_fn", "to_out", "inner_dim"),
    ),
    residual_blocks=(
        ResidualBlock("Flux2TransformerBlock", ("ff", "ff_context")),
        ResidualBlock("Flux2SingleTransformerBlock", ("attn",)),
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
    (r"^(\w+_in)\.linear_1", r"\1.in_layer"),
    (r"^(\w+_in)\.linear_2", r"\1.out_layer"),
    (r"\.attn\.norm_added_(q|k)\.weight", r".txt_attn.norm.\1_norm.scale"),
    (r"^(double_blocks\.\d+)\.attn\.norm_(q|k)\.weight", r"\1.img_attn.norm.\2_norm.scale"),
    (r"^(single_blocks\.\d+)\.attn\.norm_(q|k)\.weight", r"\1.norm.\2_norm.scale"),
    (r"\.q_norm\.", ".query_norm."),
    (r"\.k_norm\.", ".key_norm."),
    (r"\.attn\.add_(q|k|v)_proj\.", ".txt_attn.qkv."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"\.attn\.to_qkv_mlp_proj\.", ".linear1."),
    (r"^(single_blocks\.\d+)\.attn\.to_out\.", r"\1.linear2."),
    (r"\.attn\.to_(q|k|v)\.", ".img_attn.qkv."),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"^(\w+_modulation\w*)\.linear", r"\1.lin"),
    (r"\.ff\.linear_in\.", ".img_mlp.0."),
    (r"\.ff\.linear_out\.", ".img_mlp.2."),
    (r"\.ff_context\.linear_in\.", ".txt_mlp.0."),
    (r"\.ff_context\.linear_out\.", ".txt_mlp.2."),
)
"""From diffusers' names to those of Black Forest Labs."""


FAMILY = Family(
    name="flux2",
    title="FLUX.2",
    transformer_class=TRANSFORMER,
    naming_schemes=(
        NamingScheme(
            has_tensors("context_embedder.weight", "double_stream_modulation_img.linear.weight")
        ),
        NamingScheme(
            has_tensors(
                "img_in.weight", "txt_in.weight", "double_stream_modulation_img.lin.weight"
            ),
            from_original,
        ),
    ),
    sampling=sampling,
    joints=(
        Joint("joint_attention_dim", "text_encoder", "hidden_size", 3),
        Joint(("out_channels", "in_channels"), "vae", "latent_channels", 4),
    ),
    example_inputs=example,
    config=config,
    fusable=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    source_image_pipelines=(SourceImagePipeline("Flux2"), SourceImagePipeline("Flux2Klein")),
    # Found by others, who left one kind of layer in BF16 at a time.
    keep_bf16=(
        "time_guidance_embed.*",
        "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.linear",
        "single_stream_modulation.linear",
        "x_embedder",
        "context_embedder",
        "norm_out.linear",
    ),
    # linear_in is gated: its first half has as many rows as linear_out has columns.
    layer_pairs=(*DIFFUSERS_LAYER_PAIRS, ("linear_in", "linear_out")),
    published={
        "flux2-dev": PublishedModel(TRANSFORMER, {}, BENCH_IMAGE),
        "flux2-klein-4b": PublishedModel(TRANSFORMER, KLEIN_4B, BENCH_IMAGE),
    },
    fast=FAST,
    original_names=ORIGINAL_NAMES,
)
