"""Published models by the shapes of their layers, and the settings that their speed is quoted at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mezzotint.errors import BadRequest, there_are
from mezzotint.families import Sampling


@dataclass(frozen=True)
class Shape:
    """A published model: its transformer's class and configuration, and the settings that its speed is quoted at."""

    transformer: str
    config: Mapping[str, Any]
    sampling: Sampling


PICTURE = Sampling(size=1024, steps=20, guidance=1.0)
SHAPES = {
    "flux1-dev": Shape("FluxTransformer2DModel", {"guidance_embeds": True}, PICTURE),
    "flux2-dev": Shape("Flux2Transformer2DModel", {}, PICTURE),
    "flux2-klein-4b": Shape(
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        PICTURE,
    ),
    "wan2.2-a14b": Shape(
        "WanTransformer3DModel", {}, Sampling(size=480, width=832, steps=20, guidance=1.0, num_frames=81)
    ),
    "z-image-turbo": Shape("ZImageTransformer2DModel", {"axes_lens": [1536, 512, 512]}, PICTURE),
    "qwen-image": Shape("QwenImageTransformer2DModel", {}, PICTURE),
}
"""Source: the vendors' configurations, by diffusers' class defaults where those are the same."""


def shape_of(model: str) -> Shape:
    """The model of this name; BadRequest lists those that there are."""
    if model not in SHAPES:
        raise BadRequest(f"no model is called {model!r}", there_are(model, SHAPES))
    return SHAPES[model]
