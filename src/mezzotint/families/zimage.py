"""Z-Image and Z-Image-Turbo."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mezzotint.families.family import TEXT_TOKENS, Family, Joint, Sampling, TimeEmbedding
from mezzotint.families.naming import Naming
from mezzotint.families.provenance import trace
from mezzotint.families.sizes import blocks, columns, rows
from mezzotint.families.spelling import Shapes, Spelling, holds, nunchaku

OWN_NAMES = ("cap_embedder.1.weight", "cap_pad_token", "layers.0.attention.to_q.weight")


def sampling(_index: Mapping[str, Any], _config: Mapping[str, Any]) -> Sampling:
    """Of Turbo, which takes no guidance."""
    return Sampling(size=1024, steps=9, guidance=0.0)


def from_comfy(shapes: Shapes) -> Naming:
    """The naming of ComfyUI's single files, where the attention is fused."""
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    return trace(convert_z_image_transformer_checkpoint_to_diffusers, shapes)


PATCH = re.compile(r"all_x_embedder\.(\d{1,2})-(\d{1,2})\.weight")
"""The embedder of patches, its sides in pixels and in frames."""
AXES = 3


def config(shapes: Shapes) -> dict[str, Any]:
    width, head = rows(shapes, "cap_embedder.1.weight"), rows(shapes, "layers.0.attention.norm_q.weight")
    found = [match for match in map(PATCH.fullmatch, shapes) if match]
    patches = [int(match[1]) for match in found] or [2]
    frames = [int(match[2]) for match in found] or [1]
    numbers = columns(shapes, found[0][0] if found else "all_x_embedder.2-1.weight")
    axis = head // AXES // 2 * 2
    siglip = "siglip_embedder.1.weight"
    return {
        "all_patch_size": patches,
        "all_f_patch_size": frames,
        "in_channels": numbers // max(patches[0] ** 2 * frames[0], 1),
        "dim": width,
        "n_layers": blocks(shapes, "layers"),
        "n_refiner_layers": blocks(shapes, "noise_refiner"),
        "n_heads": width // head,
        "n_kv_heads": rows(shapes, "layers.0.attention.to_k.weight") // head,
        "cap_feat_dim": columns(shapes, "cap_embedder.1.weight"),
        "siglip_feat_dim": columns(shapes, siglip) if siglip in shapes else None,
        "axes_dims": [head - 2 * axis, axis, axis],
        "axes_lens": [1] * AXES,
    }


def example(config: Mapping[str, Any], sampling: Sampling, batch: int) -> dict[str, Any]:
    latents = (config["in_channels"], 1, sampling.size // 8, (sampling.width or sampling.size) // 8)
    return {
        "x": [torch.randn(*latents) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [torch.randn(TEXT_TOKENS, config["cap_feat_dim"]) for _ in range(batch)],
    }


FAMILY = Family(
    name="zimage",
    title="Z-Image",
    transformer="ZImageTransformer2DModel",
    spellings=(
        nunchaku("zimage", *OWN_NAMES),
        Spelling(holds(*OWN_NAMES)),
        Spelling(
            holds("cap_embedder.1.weight", "cap_pad_token", "layers.0.attention.qkv.weight"),
            from_comfy,
            {"norm_final.weight": "the model never uses it"},
        ),
    ),
    sampling=sampling,
    joints=(
        Joint("cap_feat_dim", "text_encoder", "hidden_size"),
        Joint("in_channels", "vae", "latent_channels"),
    ),
    example=example,
    config=config,
    together=(("attention.to_q", "attention.to_k", "attention.to_v"), ("feed_forward.w1", "feed_forward.w3")),
    modulation=("adaLN_modulation.0",),
    embedding=TimeEmbedding(
        "t_embedder",
        ("t",),
        pipelines=lambda timesteps, _dtype: (1000 - timesteps) / 1000,
        activation=nn.Identity(),
        unless="siglip_feat_dim",
    ),
)
