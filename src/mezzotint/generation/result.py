"""What a generation returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL.Image import Image
from torch import Tensor


@dataclass(frozen=True)
class GenerationResult:
    """Generated images or videos, and the latents that they were decoded from.

    images     one per prompt; none for videos
    latents    [prompts, ...] after the last step, in the dtype of the pipeline
    videos     one per prompt, each a list of frames
    fps        frames per second of the videos; None for images
    problems   what the output check found, one tuple per prompt; empty for a usable image
    notes      what differs from the request: prompts that were cut
    """

    images: list[Image]
    latents: Tensor
    videos: list[list[Image]] = field(default_factory=list)
    fps: int | None = None
    problems: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def merge(cls, results: Sequence["GenerationResult"]) -> "GenerationResult":
        """Join the results of one request, in order. `results` must not be empty."""
        return cls(
            [image for result in results for image in result.images],
            torch.cat([result.latents for result in results]),
            [video for result in results for video in result.videos],
            results[0].fps,
            tuple(found for result in results for found in result.problems),
            tuple(dict.fromkeys(note for result in results for note in result.notes)),
        )
