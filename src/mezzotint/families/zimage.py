"""Z-Image and Z-Image-Turbo."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.families.converter_trace import trace_converter
from mezzotint.families.example_inputs import EXAMPLE_TEXT_TOKENS, latent_size
from mezzotint.families.family import (
    BENCH_IMAGE,
    DIFFUSERS_LAYER_PAIRS,
    Config,
    Family,
    Joint,
    PublishedModel,
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
    same_name,
)
from mezzotint.families.recipe import Recipe, ResidualBlock, Rewrite, TextRefiner
from mezzotint.families.sampling import Sampling
from mezzotint.families.sizes import blocks, columns, rows

TRANSFORMER = "ZImageTransformer2DModel"
DIFFUSERS_NAMES = ("cap_embedder.1.weight", "cap_pad_token", "layers.0.attention.to_q.weight")
PATCH_EMBEDDER = re.compile(r"all_x_embedder\.(\d{1,2})-(\d{1,2})\.weight")
"""The embedder of patches; its name has their sides in latents and their frames."""
AXES = 3


def sampling(_index: Config, _config: Config) -> Sampling:
    """Return the settings of Turbo, which takes no guidance."""
    return Sampling(height=1024, steps=9, guidance=0.0)


def from_comfy(shapes: Shapes) -> Naming:
    """Return the naming of ComfyUI's single files, where queries, keys and values are fused."""
    from diffusers.loaders.single_file_utils import (
        convert_z_image_transformer_checkpoint_to_diffusers,
    )

    return trace_converter(convert_z_image_transformer_checkpoint_to_diffusers, shapes)


def config(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of the model that has these tensors."""
    width = rows(shapes, "cap_embedder.1.weight")
    head = rows(shapes, "layers.0.attention.norm_q.weight")
    axis = head // AXES // 2 * 2  # rotary embeddings need an even size for each axis
    siglip = "siglip_embedder.1.weight"
    return {
        **_patches(shapes),
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


def _patches(shapes: Shapes) -> dict[str, Any]:
    """Return the entries about patches, by the names and widths of their embedders."""
    matches = [match for match in map(PATCH_EMBEDDER.fullmatch, shapes) if match]
    sides = [int(match[1]) for match in matches] or [2]
    frames = [int(match[2]) for match in matches] or [1]
    features = columns(shapes, matches[0][0] if matches else "all_x_embedder.2-1.weight")
    return {
        "all_patch_size": sides,
        "all_f_patch_size": frames,
        "in_channels": features // max(sides[0] ** 2 * frames[0], 1),
    }


def example(config: Config, sampling: Sampling, batch: int) -> dict[str, Any]:
    """Return random arguments of one call of the transformer."""
    latents = (config["in_channels"], 1, *latent_size(sampling))
    return {
        "x": [torch.randn(*latents) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [
            torch.randn(EXAMPLE_TEXT_TOKENS, config["cap_feat_dim"]) for _ in range(batch)
        ],
    }


def scale_timesteps(timesteps: Tensor, _dtype: torch.dtype) -> Tensor:
    """Return what the pipeline passes: time runs from noise at 0 to the image at 1."""
    return (1000 - timesteps) / 1000


def hidden(width: int) -> int:
    """Return the features inside a feed-forward."""
    return int(width / 3 * 8)


# Nunchaku fuses w3 before w1, row-major files w1 before w3.
BLOCK = {
    "attention.to_qkv": FusedTargets(("attention.to_q", "attention.to_k", "attention.to_v")),
    **same_name("attention.to_out.0"),
    "feed_forward.net.0.proj": FusedTargets(("feed_forward.w3", "feed_forward.w1"), HIDDEN),
    "feed_forward.w13": FusedTargets(("feed_forward.w1", "feed_forward.w3"), HIDDEN),
    "feed_forward.net.2": FusedTargets(("feed_forward.w2",), WIDTH, HIDDEN),
    **same_name("feed_forward.w2", WIDTH, HIDDEN),
}
NUNCHAKU = NunchakuNames(
    blocks=(
        BlockTable(
            re.compile(r"(layers|noise_refiner|context_refiner)\.\d+"),
            BLOCK,
            "layers.0.attention_norm1.weight",
            hidden,
        ),
    ),
    model_class="NunchakuZImageTransformer2DModel",
    skippable="_refiner.",
)


FAST = Recipe(
    attn_processors={"ZSingleStreamAttnProcessor": "joint"},
    feed_forward=Rewrite("FeedForward", "split_swiglu", ("w1", "w2", "w3", "_forward_silu_gating")),
    residual_blocks=(
        ResidualBlock(
            "ZImageTransformerBlock",
            ("ffn_norm2",),
            arguments=("x",),
            # Blocks that refine text have no gate.
            unsupported=("modulation", False),
        ),
    ),
    final_layer="all_final_layer",
    text_refiner=TextRefiner(
        text_argument="cap_feats",
        embedder="cap_embedder",
        blocks="context_refiner",
        image_blocks="noise_refiner",
        join="_build_unified_sequence",
        join_text="cap",
        join_lengths="cap_seqlens",
    ),
)


ORIGINAL_NAMES = (
    (r"^all_(x_embedder|final_layer)\.\d+-\d+\.", r"\1."),
    (r"\.attention\.to_(q|k|v)\.", ".attention.qkv."),
    (r"\.attention\.to_out\.0\.", ".attention.out."),
    (r"\.attention\.norm_(q|k)\.", r".attention.\1_norm."),
)
"""From diffusers' names to those of the makers' single files."""


FAMILY = Family(
    name="zimage",
    title="Z-Image",
    transformer_class=TRANSFORMER,
    naming_schemes=(
        nunchaku_naming_scheme(NUNCHAKU, *DIFFUSERS_NAMES),
        NamingScheme(has_tensors(*DIFFUSERS_NAMES)),
        NamingScheme(
            has_tensors("cap_embedder.1.weight", "cap_pad_token", "layers.0.attention.qkv.weight"),
            from_comfy,
            {"norm_final.weight": "the model never uses it"},
        ),
    ),
    sampling=sampling,
    joints=(
        Joint("cap_feat_dim", "text_encoder", "hidden_size"),
        Joint("in_channels", "vae", "latent_channels"),
    ),
    example_inputs=example,
    config=config,
    fusable=(
        ("attention.to_q", "attention.to_k", "attention.to_v"),
        ("feed_forward.w1", "feed_forward.w3"),
    ),
    modulation_layers=("adaLN_modulation.0",),
    time_embedding=TimeEmbedding(
        "t_embedder",
        ("t",),
        scale_timesteps=scale_timesteps,
        activation=nn.Identity(),
        unsupported_config_key="siglip_feat_dim",
    ),
    # The layers that diffusers itself never casts to FP8: `_skip_layerwise_casting_patterns`.
    keep_bf16=("t_embedder.*", "cap_embedder.*"),
    layer_pairs=(*DIFFUSERS_LAYER_PAIRS, ("feed_forward.w3", "feed_forward.w2")),
    gate_up=(("w1", "w3"),),
    nunchaku=NUNCHAKU,
    published={
        "z-image-turbo": PublishedModel(TRANSFORMER, {"axes_lens": [1536, 512, 512]}, BENCH_IMAGE)
    },
    fast=FAST,
    original_names=ORIGINAL_NAMES,
)
