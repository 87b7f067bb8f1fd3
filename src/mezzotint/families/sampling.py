"""The settings of a generation."""

import math
from dataclasses import dataclass, replace
from typing import Any

SIZE_MULTIPLE = 32
"""Sides in multiples of this are valid in every family.

The largest cell is that of Wan 2.2 TI2V-5B: 16 pixels to a latent, two latents to a token.
"""


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation.

    height, width         in pixels; a width of None is the height
    guidance              guidance scale
    max_sequence_length   in text tokens; None is the pipeline's default
    num_frames, fps       None for an image
    negative_prompt       what to avoid; it needs a guidance that uses it
    true_cfg_scale        classifier-free guidance on top of an embedded one (FLUX.1, Qwen-Image)
    guidance_2            guidance of the second transformer (Wan 2.2 A14B); None is `guidance`
    flow_shift            the scheduler's; None is the model's own
    """

    height: int
    steps: int
    guidance: float
    max_sequence_length: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    negative_prompt: str | None = None
    true_cfg_scale: float | None = None
    guidance_2: float | None = None
    flow_shift: float | None = None

    def replace(self, **changes: str | int | float | None) -> "Sampling":
        """Return the settings with every change that is not None; a height alone makes a square."""
        if changes.get("height") is not None:
            changes.setdefault("width", changes["height"])
        present: dict[str, Any] = {k: value for k, value in changes.items() if value is not None}
        return replace(self, **present)

    def with_aspect_ratio(self, width: int, height: int) -> "Sampling":
        """Return settings of about the same area in the aspect ratio of width x height pixels."""
        scale = (
            math.sqrt(self.height * (self.width or self.height) / (width * height)) / SIZE_MULTIPLE
        )
        return self.replace(
            width=max(1, round(width * scale)) * SIZE_MULTIPLE,
            height=max(1, round(height * scale)) * SIZE_MULTIPLE,
        )


def image_arguments(sampling: Sampling, _prompts: int) -> dict[str, Any]:
    """Return the settings as arguments of an image pipeline, whatever the number of prompts."""
    length = sampling.max_sequence_length
    return {
        "height": sampling.height,
        "width": sampling.width or sampling.height,
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
    } | ({} if length is None else {"max_sequence_length": length})
