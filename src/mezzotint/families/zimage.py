"""Z-Image and Z-Image-Turbo."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mezzotint.families.family import TEXT_TOKENS, Family, Joint, Sampling, TimeEmbedding
from mezzotint.families.naming import Naming
from mezzotint.families.provenance import trace
from mezzotint.families.spelling import Shapes, Spelling, holds, nunchaku

OWN_NAMES = ("cap_embedder.1.weight", "cap_pad_token", "layers.0.attention.to_q.weight")


def sampling(_index: Mapping[str, Any], _config: Mapping[str, Any]) -> Sampling:
    """Of Turbo, which takes no guidance."""
    return Sampling(size=1024, steps=9, guidance=0.0)


def from_comfy(shapes: Shapes) -> Naming:
    """The naming of ComfyUI's single files, where the attention is fused."""
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    return trace(convert_z_image_transformer_checkpoint_to_diffusers, shapes)


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
