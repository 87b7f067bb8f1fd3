"""Wan 2.2, text and image to video: A14B, a pair of transformers, and TI2V-5B."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from mezzotint.families.family import TEXT_TOKENS, Family, Joint, Sampling, picture_arguments
from mezzotint.families.naming import Naming
from mezzotint.families.provenance import trace
from mezzotint.families.sizes import blocks, columns, rows, side
from mezzotint.families.spelling import Shapes, Spelling, holds


def sampling(index: Mapping[str, Any], _config: Mapping[str, Any]) -> Sampling:
    """Of A14B; TI2V-5B is the one with a time step for each token."""
    if index.get("expand_timesteps"):
        return Sampling(size=704, width=1280, steps=50, guidance=5.0, num_frames=121, fps=24)
    return Sampling(size=720, width=1280, steps=40, guidance=4.0, num_frames=81, fps=16)


def arguments(sampling: Sampling, prompts: int) -> dict[str, Any]:
    return picture_arguments(sampling, prompts) | {"num_frames": sampling.num_frames, "output_type": "pil"}


def from_original(shapes: Shapes) -> Naming:
    """The naming of the Wan team's files."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    return trace(convert_wan_transformer_to_diffusers, shapes)


HEADS = (128, 64, 32, 16, 12, 8, 4, 2)
"""Sizes of a head, the usual first: no tensor's shape follows from it."""
IMAGE = "condition_embedder.image_embedder"


def config(shapes: Shapes) -> dict[str, Any]:
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
        **_of_images(shapes),
    }


def _of_images(shapes: Shapes) -> dict[str, int]:
    """What the models that begin with an image have besides."""
    found = {
        "image_dim": (f"{IMAGE}.ff.net.0.proj.weight", 1),
        "added_kv_proj_dim": ("blocks.0.attn2.add_k_proj.weight", 1),
        "pos_embed_seq_len": (f"{IMAGE}.pos_embed", 1),
    }
    return {entry: side(shapes, name, axis) for entry, (name, axis) in found.items() if name in shapes}


def example(config: Mapping[str, Any], sampling: Sampling, batch: int) -> dict[str, Any]:
    """Of a model whose VAE takes 4 frames and 8 x 8 pixels to one latent, which is A14B."""
    frames = ((sampling.num_frames or 1) - 1) // 4 + 1
    latents = (config["in_channels"], frames, sampling.size // 8, (sampling.width or sampling.size) // 8)
    return {
        "hidden_states": torch.randn(batch, *latents),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, config["text_dim"]),
    }


FAMILY = Family(
    name="wan",
    title="Wan 2.2",
    transformer="WanTransformer3DModel",
    spellings=(
        Spelling(holds("patch_embedding.weight", "condition_embedder.time_proj.weight", "blocks.0.attn2.to_q.weight")),
        Spelling(
            holds("patch_embedding.weight", "time_projection.1.weight", "blocks.0.cross_attn.q.weight"), from_original
        ),
    ),
    sampling=sampling,
    joints=(Joint("text_dim", "text_encoder", "d_model"), Joint("out_channels", "vae", "z_dim")),
    example=example,
    config=config,
    together=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
    arguments=arguments,
)
