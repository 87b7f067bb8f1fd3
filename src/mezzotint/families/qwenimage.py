"""Qwen-Image; its makers, diffusers and ComfyUI all use the same names."""

import re
from typing import Any

import torch

from mezzotint.families.example_inputs import EXAMPLE_TEXT_TOKENS, packed_size
from mezzotint.families.family import (
    BENCH_IMAGE,
    DIFFUSERS_MODULATION,
    Config,
    Family,
    Joint,
    PublishedModel,
    SourceImagePipeline,
    TimeEmbedding,
)
from mezzotint.families.latent_grid import PATCH, LatentGrid
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
    same_name,
)
from mezzotint.families.recipe import GELU_FEED_FORWARD, Recipe, ResidualBlock
from mezzotint.families.sampling import Sampling, image_arguments
from mezzotint.families.sizes import blocks, columns, rows

TRANSFORMER = "QwenImageTransformer2DModel"
LAYERED = "time_text_embed.addition_t_embedding.weight"
"""An nn.Embedding that only Qwen-Image-Layered has."""
DIFFUSERS_NAMES = ("txt_norm.weight", "img_in.weight", "transformer_blocks.0.img_mod.1.weight")
VAE_DOWNSAMPLING = (False, True, True)
"""Default of AutoencoderKLQwenImage's `temperal_downsample`: each level halves the sides."""


def sampling(index: Config, _config: Config) -> Sampling:
    """Return the settings; edit models generate the area that their pipelines resize images to."""
    edits = str(index.get("_class_name")).startswith("QwenImageEdit")
    return Sampling(height=1024 if edits else 1328, steps=50, guidance=4.0)


def arguments(sampling: Sampling, prompts: int) -> dict[str, Any]:
    """Return arguments with true CFG and an empty negative prompt; no guidance embedder exists."""
    image = image_arguments(sampling, prompts)
    guidance = image.pop("guidance_scale")
    return image | {"true_cfg_scale": guidance, "negative_prompt": [" "] * prompts}


def config(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of the model that has these tensors."""
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


def example(config: Config, sampling: Sampling, batch: int) -> dict[str, Any]:
    """Return random arguments of one call of the transformer."""
    height, width = packed_size(sampling)
    return {
        "hidden_states": torch.randn(batch, height * width, config["in_channels"]),
        "encoder_hidden_states": torch.randn(
            batch, EXAMPLE_TEXT_TOKENS, config["joint_attention_dim"]
        ),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, height, width)]] * batch,
    }


def latent_grid(vae: Config, _transformer: Config) -> LatentGrid:
    """Return the grid of AutoencoderKLQwenImage, which halves the sides at each level."""
    side = 2 ** len(vae.get("temperal_downsample") or VAE_DOWNSAMPLING) * PATCH
    return LatentGrid(side, side)


def hidden(width: int) -> int:
    """Return the features inside a feed-forward."""
    return 4 * width


BLOCK = {
    "attn.to_qkv": FusedTargets(("attn.to_q", "attn.to_k", "attn.to_v")),
    "attn.add_qkv_proj": FusedTargets(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    **same_name("attn.to_out.0"),
    **same_name("attn.to_add_out"),
    **same_name("img_mlp.net.0.proj", HIDDEN),
    **same_name("img_mlp.net.2", WIDTH, HIDDEN),
    **same_name("txt_mlp.net.0.proj", HIDDEN),
    **same_name("txt_mlp.net.2", WIDTH, HIDDEN),
}
NUNCHAKU = NunchakuNames(
    blocks=(BlockTable(re.compile(r"transformer_blocks\.\d+"), BLOCK, "img_in.weight", hidden),),
    awq=("img_mod.1", "txt_mod.1"),
    model_class="NunchakuQwenImageTransformer2DModel",
)


FAST = Recipe(
    attn_processors={"QwenDoubleStreamAttnProcessor2_0": "joint"},
    feed_forward=GELU_FEED_FORWARD,
    residual_blocks=(
        ResidualBlock(
            "QwenImageTransformerBlock",
            ("img_mlp", "txt_mlp"),
            # Blocks of Qwen-Image-Edit have a gate per token.
            unsupported=("zero_cond_t", True),
        ),
    ),
    final_layer="norm_out",
)


FAMILY = Family(
    name="qwenimage",
    title="Qwen-Image",
    transformer_class=TRANSFORMER,
    naming_schemes=(
        nunchaku_naming_scheme(NUNCHAKU, *DIFFUSERS_NAMES),
        NamingScheme(has_tensors(*DIFFUSERS_NAMES)),
    ),
    sampling=sampling,
    joints=(
        Joint("joint_attention_dim", "text_encoder", "hidden_size"),
        Joint("out_channels", "vae", "z_dim"),
    ),
    example_inputs=example,
    config=config,
    fusable=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    modulation_layers=("img_mod.1", "txt_mod.1"),
    time_embedding=TimeEmbedding("time_text_embed", ("timestep", "guidance", "additional_t_cond")),
    pipeline_arguments=arguments,
    flags={"__index_timestep_zero__": "zero_cond_t"},
    latent_grid=latent_grid,
    # The processor of Qwen2.5-VL reads videos with torchvision, and imports it for images too.
    source_image_pipelines=(
        SourceImagePipeline("QwenImageEdit", required=True, library="torchvision"),
        SourceImagePipeline("QwenImageEditPlus", required=True, library="torchvision"),
    ),
    # Found by others, who left one kind of layer in BF16 at a time.
    keep_bf16=(
        "img_in",
        "txt_in",
        "time_text_embed.*",
        "norm_out.linear",
        "proj_out",
        "transformer_blocks.*.img_mlp.net.2",
        "transformer_blocks.*.img_mod.*",
        "transformer_blocks.*.txt_mod.*",
    ),
    modulation_words=(*DIFFUSERS_MODULATION, "img_mod", "txt_mod"),
    nunchaku=NUNCHAKU,
    published={"qwen-image": PublishedModel(TRANSFORMER, {}, BENCH_IMAGE)},
    fast=FAST,
)
