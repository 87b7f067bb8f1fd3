"""Qwen-Image, whose makers, diffusers and ComfyUI all use the same names."""

from collections.abc import Mapping
from typing import Any

import torch

from mezzotint.families.family import TEXT_TOKENS, Family, Joint, Sampling, TimeEmbedding, picture_arguments
from mezzotint.families.sizes import blocks, columns, rows
from mezzotint.families.spelling import Shapes, Spelling, holds, nunchaku

LAYERED = "time_text_embed.addition_t_embedding.weight"
"""An nn.Embedding that only Qwen-Image-Layered has."""
PATCH = 2
OWN_NAMES = ("txt_norm.weight", "img_in.weight", "transformer_blocks.0.img_mod.1.weight")


def sampling(index: Mapping[str, Any], _config: Mapping[str, Any]) -> Sampling:
    """The models that edit paint at the area that their pipelines scale the picture to."""
    edits = str(index.get("_class_name")).startswith("QwenImageEdit")
    return Sampling(size=1024 if edits else 1328, steps=50, guidance=4.0)


def arguments(sampling: Sampling, prompts: int) -> dict[str, Any]:
    """Guidance is against the picture of an empty prompt; the model itself has no embedder for it."""
    given = picture_arguments(sampling, prompts)
    guidance = given.pop("guidance_scale")
    return given | {"true_cfg_scale": guidance, "negative_prompt": [" "] * prompts}


def config(shapes: Shapes) -> dict[str, Any]:
    head = rows(shapes, "transformer_blocks.0.attn.norm_q.weight")
    return {
        "patch_size": PATCH,
        "in_channels": columns(shapes, "img_in.weight"),
        "out_channels": rows(shapes, "proj_out.weight") // PATCH**2,
        "num_layers": blocks(shapes, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": rows(shapes, "img_in.weight") // head,
        "joint_attention_dim": columns(shapes, "txt_in.weight"),
        "use_additional_t_cond": LAYERED in shapes,
    }


def example(config: Mapping[str, Any], sampling: Sampling, batch: int) -> dict[str, Any]:
    height, width = sampling.size // 16, (sampling.width or sampling.size) // 16
    return {
        "hidden_states": torch.randn(batch, height * width, config["in_channels"]),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, config["joint_attention_dim"]),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, height, width)]] * batch,
    }


FAMILY = Family(
    name="qwenimage",
    title="Qwen-Image",
    transformer="QwenImageTransformer2DModel",
    spellings=(nunchaku("qwenimage", *OWN_NAMES), Spelling(holds(*OWN_NAMES))),
    sampling=sampling,
    joints=(
        Joint("joint_attention_dim", "text_encoder", "hidden_size"),
        Joint("out_channels", "vae", "z_dim"),
    ),
    example=example,
    config=config,
    together=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    modulation=("img_mod.1", "txt_mod.1"),
    embedding=TimeEmbedding("time_text_embed", ("timestep", "guidance", "additional_t_cond")),
    arguments=arguments,
    flags={"__index_timestep_zero__": "zero_cond_t"},
)
