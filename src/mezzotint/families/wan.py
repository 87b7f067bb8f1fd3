"""Wan 2.2, text and image to video: A14B, a pair of transformers, and TI2V-5B."""

import math
from typing import Any

import torch

from mezzotint.families.converter_trace import trace_converter
from mezzotint.families.example_inputs import EXAMPLE_TEXT_TOKENS, latent_size
from mezzotint.families.family import Config, Family, Joint, PublishedModel, SourceImagePipeline
from mezzotint.families.latent_grid import PATCH, LatentGrid
from mezzotint.families.naming import Naming
from mezzotint.families.naming_scheme import NamingScheme, Shapes, has_tensors
from mezzotint.families.recipe import GELU_FEED_FORWARD, Recipe
from mezzotint.families.sampling import Sampling, image_arguments
from mezzotint.families.sizes import blocks, columns, rows, side

TRANSFORMER = "WanTransformer3DModel"
HEADS = (128, 64, 32, 16, 12, 8, 4, 2)
"""Possible head sizes, the usual one first: no tensor's shape determines it."""
IMAGE_EMBEDDER = "condition_embedder.image_embedder"


def sampling(index: Config, _config: Config) -> Sampling:
    """Return the settings of A14B, or of TI2V-5B, which has a time step for each token."""
    if index.get("expand_timesteps"):
        return Sampling(height=704, width=1280, steps=50, guidance=5.0, num_frames=121, fps=24)
    return Sampling(height=720, width=1280, steps=40, guidance=4.0, num_frames=81, fps=16)


def arguments(sampling: Sampling, prompts: int) -> dict[str, Any]:
    """Return the settings as arguments of a video pipeline."""
    return image_arguments(sampling, prompts) | {
        "num_frames": sampling.num_frames,
        "output_type": "pil",
    }


def from_original(shapes: Shapes) -> Naming:
    """Return the naming of the Wan team's files."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    return trace_converter(convert_wan_transformer_to_diffusers, shapes)


def config(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of the model that has these tensors."""
    width = rows(shapes, "patch_embedding.weight")
    patch = tuple(side(shapes, "patch_embedding.weight", axis) for axis in (2, 3, 4))
    head = next((size for size in HEADS if width % size == 0), 1)
    return {
        "patch_size": patch,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": columns(shapes, "patch_embedding.weight"),
        "out_channels": rows(shapes, "proj_out.weight") // math.prod(patch),
        "text_dim": columns(shapes, "condition_embedder.text_embedder.linear_1.weight"),
        "freq_dim": columns(shapes, "condition_embedder.time_embedder.linear_1.weight"),
        "ffn_dim": rows(shapes, "blocks.0.ffn.net.0.proj.weight"),
        "num_layers": blocks(shapes, "blocks"),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in shapes else None,
        **_image_entries(shapes),
    }


def _image_entries(shapes: Shapes) -> dict[str, int]:
    """Return the additional entries of models that start from an image."""
    sources = {
        "image_dim": (f"{IMAGE_EMBEDDER}.ff.net.0.proj.weight", 1),
        "added_kv_proj_dim": ("blocks.0.attn2.add_k_proj.weight", 1),
        "pos_embed_seq_len": (f"{IMAGE_EMBEDDER}.pos_embed", 1),
    }
    return {
        entry: side(shapes, name, axis) for entry, (name, axis) in sources.items() if name in shapes
    }


def example(config: Config, sampling: Sampling, batch: int) -> dict[str, Any]:
    """Return random arguments of one call, with A14B's VAE: 4 frames and 8 x 8 pixels a latent."""
    frames = ((sampling.num_frames or 1) - 1) // 4 + 1
    latents = (config["in_channels"], frames, *latent_size(sampling))
    return {
        "hidden_states": torch.randn(batch, *latents),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, EXAMPLE_TEXT_TOKENS, config["text_dim"]),
    }


def latent_grid(vae: Config, transformer: Config) -> LatentGrid:
    """Return the grid of AutoencoderKLWan, whose configuration states its factors."""
    pixels = vae.get("scale_factor_spatial") or 8
    _, rows, columns = transformer.get("patch_size") or (1, PATCH, PATCH)
    return LatentGrid(pixels * rows, pixels * columns, vae.get("scale_factor_temporal") or 4)


def source_image_pipeline(pipeline: str, index: Config) -> str:
    """Return WanImageToVideo for TI2V-5B: it takes images too, but is published as WanPipeline."""
    if pipeline == "WanPipeline" and index.get("expand_timesteps"):
        return "WanImageToVideoPipeline"
    return pipeline


FAST = Recipe(feed_forward=GELU_FEED_FORWARD)


ORIGINAL_NAMES = (
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"\.scale_shift_table", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_(q|k|v)\.", r".\1."),
    (r"\.add_(k|v)_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
)
"""From diffusers' names to those of the Wan team."""


FAMILY = Family(
    name="wan",
    title="Wan 2.2",
    transformer_class=TRANSFORMER,
    naming_schemes=(
        NamingScheme(
            has_tensors(
                "patch_embedding.weight",
                "condition_embedder.time_proj.weight",
                "blocks.0.attn2.to_q.weight",
            )
        ),
        NamingScheme(
            has_tensors(
                "patch_embedding.weight", "time_projection.1.weight", "blocks.0.cross_attn.q.weight"
            ),
            from_original,
        ),
    ),
    sampling=sampling,
    joints=(Joint("text_dim", "text_encoder", "d_model"), Joint("out_channels", "vae", "z_dim")),
    example_inputs=example,
    config=config,
    fusable=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
    pipeline_arguments=arguments,
    latent_grid=latent_grid,
    # The pipeline cleans prompts with ftfy, and fails without it.
    source_image_pipelines=(SourceImagePipeline("WanImageToVideo", library="ftfy"),),
    source_image_pipeline=source_image_pipeline,
    # The layers that diffusers itself never casts to FP8: `_skip_layerwise_casting_patterns`.
    keep_bf16=("condition_embedder.*",),
    published={
        "wan2.2-a14b": PublishedModel(
            TRANSFORMER,
            {},
            Sampling(height=480, width=832, steps=20, guidance=1.0, num_frames=81),
        )
    },
    fast=FAST,
    original_names=ORIGINAL_NAMES,
)
