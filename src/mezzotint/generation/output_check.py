"""Detect output that is not a usable image: NaN, one color, saturation or noise.

The limits were set on 1,000 images of the built-in model, photographs, and several kinds of noise.
docs/proof.md has
the figures.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

Pixels = NDArray[np.float64]
"""[height, width, 3] in 0..255."""

SOLID_COLOR_SHARE, SOLID_COLOR_RANGE = 0.999, 3.0
SATURATED_SHARE = 0.99
TILE_COUNT, COARSE_TILE_COUNT = 8, 4
MAX_CONTRAST_SPREAD, COARSE_SHARE, MAX_NOISE_CORRELATION, MIN_CHROMA_SHARE = 0.33, 0.2, 0.5, 0.25


def find_problems(frames: Sequence[Image], latents: Tensor) -> tuple[str, ...]:
    """Return the problems of an image (one frame) or a video, in words; empty if there are none.

    A video has a problem if more than half of its frames have one: a video may begin with black
    frames.

    latents   that were decoded, in any shape; the VAE turns NaN and infinity into black pixels
    """
    broken = int((~torch.isfinite(latents)).sum())
    found = [f"{broken} of {latents.numel()} latents are NaN or infinite"] if broken else []
    frame_problems = [problem for problem in map(_frame_problem, frames) if problem]
    if 2 * len(frame_problems) > len(frames):
        found.append(frame_problems[0])
    return tuple(found)


def describe_problems(prompts: Sequence[str], problems: Sequence[Sequence[str]]) -> tuple[str, str]:
    """Return the message and the hint of an error about bad output."""
    described = [
        f"{prompt!r}: {'; '.join(found)}"
        for prompt, found in zip(prompts, problems, strict=True)
        if found
    ]
    return (
        f"{len(described)} of {len(prompts)} outputs are unusable: {'. '.join(described)}",
        "`mezzotint verify` looks for damage in the checkpoint; --backend reference rules out "
        "a kernel.",
    )


def _frame_problem(frame: Image) -> str | None:
    """Return the first problem of a frame."""
    pixels = np.asarray(frame.convert("RGB"), dtype=np.float64)
    return next((problem for check in CHECKS if (problem := check(pixels))), None)


def _solid_color(pixels: Pixels) -> str | None:
    """Detect that nearly every pixel has the same color."""
    middle = np.median(pixels, axis=(0, 1))
    if (np.abs(pixels - middle).max(-1) <= SOLID_COLOR_RANGE).mean() < SOLID_COLOR_SHARE:
        return None
    return f"a single color, RGB {', '.join(f'{value:.0f}' for value in middle)}"


def _saturated(pixels: Pixels) -> str | None:
    """Detect that nearly every value is 0 or 255."""
    share = float(((pixels <= 0) | (pixels >= 255)).mean())
    return None if share < SATURATED_SHARE else f"saturated: {share:.1%} of all values are 0 or 255"


def _noise(pixels: Pixels) -> str | None:
    """Detect static noise: even contrast, no coarse structure, and unrelated neighbors or colors.

    Grass and gravel have the first two properties as well. The last one tells them from noise in
    pixels and from
    decoded noise in latents.
    """
    if min(pixels.shape[:2]) < 2 * TILE_COUNT:
        return None
    variance = pixels.var(axis=(0, 1)).mean()
    if not (_is_even(pixels) and _coarse_variance(pixels) < COARSE_SHARE * variance):
        return None
    correlation = 1 - np.square(np.diff(pixels, axis=1)).mean() / (2 * variance)
    chroma = (pixels - pixels.mean(-1, keepdims=True)).var(axis=(0, 1)).mean()
    if correlation < MAX_NOISE_CORRELATION or chroma > MIN_CHROMA_SHARE * variance:
        return (
            f"static noise: neighboring pixels correlate by {correlation:.2f}, and no part differs "
            f"from another"
        )
    return None


def _is_even(pixels: Pixels) -> bool:
    """Return whether all tiles have a similar contrast."""
    contrast = _tiles(pixels, TILE_COUNT).std(axis=(1, 3)).mean(-1)
    return bool(contrast.std() < MAX_CONTRAST_SPREAD * contrast.mean())


def _coarse_variance(pixels: Pixels) -> float:
    """Return the variance of the means of coarse tiles."""
    means = _tiles(pixels, COARSE_TILE_COUNT).mean(axis=(1, 3))
    return float(np.square(means - pixels.mean(axis=(0, 1))).mean())


def _tiles(pixels: Pixels, count: int) -> Pixels:
    """Cut an image into tiles, [count, rows, count, columns, 3]; drop the remainder."""
    rows, columns = (side // count for side in pixels.shape[:2])
    return pixels[: rows * count, : columns * count].reshape(count, rows, count, columns, 3)


CHECKS: tuple[Callable[[Pixels], str | None], ...] = (_solid_color, _noise, _saturated)
