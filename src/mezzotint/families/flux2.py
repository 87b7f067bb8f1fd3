"""FLUX.2: dev, and klein 4B and 9B."""

from collections.abc import Mapping
from typing import Any

import torch

from mezzotint.families.family import TEXT_TOKENS, Family, Joint, Sampling, grid
from mezzotint.families.naming import Naming
from mezzotint.families.provenance import trace
from mezzotint.families.sizes import columns, flux_blocks, holds_any, rows
from mezzotint.families.spelling import Shapes, Spelling, holds


def sampling(index: Mapping[str, Any], _config: Mapping[str, Any]) -> Sampling:
    """Of dev and of the base models; the distilled klein takes four steps and no guidance."""
    if index.get("is_distilled"):
        return Sampling(size=1024, steps=4, guidance=1.0)
    return Sampling(size=1024, steps=50, guidance=4.0)


def from_original(shapes: Shapes) -> Naming:
    """The naming of Black Forest Labs' files."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    return trace(convert_flux2_transformer_checkpoint_to_diffusers, shapes)


def config(shapes: Shapes) -> dict[str, Any]:
    width = rows(shapes, "x_embedder.weight")
    return {
        **flux_blocks(shapes),
        "timestep_guidance_channels": columns(shapes, "time_guidance_embed.timestep_embedder.linear_1.weight"),
        "mlp_ratio": _hidden(shapes, width) / width,
        "guidance_embeds": holds_any(shapes, "time_guidance_embed.guidance_embedder."),
    }


def _hidden(shapes: Shapes, width: int) -> int:
    """Features inside the MLP; a single block's last layer reads those of the attention, too."""
    if "transformer_blocks.0.ff.linear_out.weight" in shapes:
        return columns(shapes, "transformer_blocks.0.ff.linear_out.weight")
    return columns(shapes, "single_transformer_blocks.0.attn.to_out.weight") - width


def example(config: Mapping[str, Any], sampling: Sampling, batch: int) -> dict[str, Any]:
    ids = grid(sampling.size // 16, (sampling.width or sampling.size) // 16, 4)
    inputs = {
        "hidden_states": torch.randn(batch, len(ids), config["in_channels"]),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, config["joint_attention_dim"]),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT_TOKENS, 4),
    }
    return inputs | ({"guidance": torch.full((batch,), 4.0)} if config["guidance_embeds"] else {})


FAMILY = Family(
    name="flux2",
    title="FLUX.2",
    transformer="Flux2Transformer2DModel",
    spellings=(
        Spelling(holds("context_embedder.weight", "double_stream_modulation_img.linear.weight")),
        Spelling(holds("img_in.weight", "txt_in.weight", "double_stream_modulation_img.lin.weight"), from_original),
    ),
    sampling=sampling,
    joints=(
        Joint("joint_attention_dim", "text_encoder", "hidden_size", 3),
        Joint(("out_channels", "in_channels"), "vae", "latent_channels", 4),
    ),
    example=example,
    config=config,
    together=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
)
