"""Wan 2.2, text and image to video: A14B, a pair of transformers, and TI2V-5B."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mezzotint.families.family import TEXT_TOKENS, Family, Joint, Sampling, picture_arguments
from mezzotint.families.naming import Naming
from mezzotint.families.provenance import trace
from mezzotint.families.spelling import Shapes, Spelling, holds

OTHER_MODELS = ("vace_blocks.", "face_adapter.", "motion_encoder.")
"""Wan VACE and Wan Animate are other classes, with all of Wan's tensors and these besides."""


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


def _wan(*names: str) -> Callable[[Shapes], bool]:
    there = holds("patch_embedding.weight", *names)
    return lambda shapes: there(shapes) and not any(name.startswith(OTHER_MODELS) for name in shapes)


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
        Spelling(_wan("condition_embedder.time_proj.weight", "blocks.0.attn2.to_q.weight")),
        Spelling(_wan("time_projection.1.weight", "blocks.0.cross_attn.q.weight"), from_original),
    ),
    sampling=sampling,
    joints=(Joint("text_dim", "text_encoder", "d_model"), Joint("out_channels", "vae", "z_dim")),
    example=example,
    together=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
    arguments=arguments,
)
