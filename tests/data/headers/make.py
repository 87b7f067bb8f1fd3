"""Write tests/data/headers: names, dtypes and shapes of full-size checkpoints, without weights.

Each model's file holds the transformer's configuration and two forms. "diffusers" is the model on
the meta device. "original" has the names of the original files (ComfyUI's for Z-Image and
Qwen-Image). They are written by hand from the original code, to check diffusers' converters.

    PYTHONPATH=src:tests python tests/data/headers/make.py
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from mezzotint.families.building import build_meta_model
from support.header_fixtures import FOLDER, collapse
from support.original_names import TO_ORIGINAL

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

FLUX1 = {"guidance_embeds": True}
FLUX2_KLEIN = {"guidance_embeds": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux1-dev": ("FluxTransformer2DModel", FLUX1),
    "flux2-dev": ("Flux2Transformer2DModel", {}),
    "flux2-klein-4b": (
        "Flux2Transformer2DModel",
        FLUX2_KLEIN
        | {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
        },
    ),
    "flux2-klein-9b": (
        "Flux2Transformer2DModel",
        FLUX2_KLEIN
        | {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
        },
    ),
    "wan2.2-t2v-a14b": ("WanTransformer3DModel", {}),
    "wan2.2-ti2v-5b": (
        "WanTransformer3DModel",
        {
            "num_layers": 30,
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "in_channels": 48,
            "out_channels": 48,
        },
    ),
    "z-image-turbo": ("ZImageTransformer2DModel", {"axes_lens": [1536, 512, 512]}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
}

EXTRA = {"z-image-turbo": {"model.diffusion_model.norm_final.weight": (3840,)}}


def renamed(shapes: Shapes, rules: Iterable[tuple[str, str]]) -> Shapes:
    """Return the tensors under original names; tensors with equal names are joined by rows."""
    found: Shapes = {}
    for name, (rows, *rest) in shapes.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = (rows + found.get(name, (0,))[0], *rest)
    return found


def main() -> None:
    for name, (model_class, changes) in MODELS.items():
        model = build_meta_model(model_class, changes)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        original = renamed(shapes, TO_ORIGINAL[name.split("-")[0]]) | EXTRA.get(name, {})
        forms = {"diffusers": collapse(shapes), "original": collapse(original)}
        config = {"_class_name": model_class} | changes
        (FOLDER / f"{name}.json").write_text(
            json.dumps({"config": config} | forms, indent=0) + "\n"
        )


if __name__ == "__main__":
    main()
