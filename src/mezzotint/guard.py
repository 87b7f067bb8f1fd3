"""The output guard: what cannot be a picture is named, so that nobody is handed black or noise in silence.

The limits were set on 1,000 pictures of the built-in model, photographs, and noise of several kinds; the figures are in
docs/proof.md.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

Pixels = NDArray[np.float64]
"""[height, width, 3] in 0..255."""

CONSTANT_SHARE, CONSTANT_RANGE = 0.999, 3.0
SATURATED_SHARE = 0.99
WINDOWS, COARSE = 8, 4
STEADY_CONTRAST, COARSE_SHARE, UNRELATED, COLOURFUL = 0.33, 0.2, 0.5, 0.25


def problems_of(frames: Sequence[Image], latents: Tensor) -> tuple[str, ...]:
    """What is wrong with a picture (one frame) or video, each in words; empty if nothing is.

    latents   that were decoded, in any shape; a NaN or infinity there turns into black pixels unseen
    A video has what more than half of its frames have: one may begin in the dark.
    """
    broken = int((~torch.isfinite(latents)).sum())
    found = [f"{broken} of {latents.numel()} latents are NaN or infinite"] if broken else []
    said = [words for words in map(_problem_of, frames) if words]
    return (*found, said[0]) if 2 * len(said) > len(frames) else tuple(found)


def _problem_of(frame: Image) -> str | None:
    """The first thing that is wrong with a picture."""
    pixels = np.asarray(frame.convert("RGB"), dtype=np.float64)
    return next((words for words in (check(pixels) for check in CHECKS) if words), None)


def _constant(pixels: Pixels) -> str | None:
    """Nearly every pixel is of one colour."""
    middle = np.median(pixels, axis=(0, 1))
    if (np.abs(pixels - middle).max(-1) <= CONSTANT_RANGE).mean() < CONSTANT_SHARE:
        return None
    return f"a single colour, RGB {', '.join(f'{value:.0f}' for value in middle)}"


def _saturated(pixels: Pixels) -> str | None:
    """Nearly every value is at one of the two ends."""
    share = float(((pixels <= 0) | (pixels >= 255)).mean())
    return None if share < SATURATED_SHARE else f"saturated: {share:.1%} of all values are 0 or 255"


def _noise(pixels: Pixels) -> str | None:
    """Static: contrast is the same everywhere, it vanishes in coarse averages, and neighbours or colours are unrelated.

    Grass and gravel have the first two; the last tells them from noise in pixels and from decoded noise in latents.
    """
    if min(pixels.shape[:2]) < 2 * WINDOWS:
        return None
    contrast = _tiles(pixels, WINDOWS).std(axis=(1, 3)).mean(-1)
    variance = pixels.var(axis=(0, 1)).mean()
    coarse = np.square(_tiles(pixels, COARSE).mean(axis=(1, 3)) - pixels.mean(axis=(0, 1))).mean()
    neighbours = 1 - np.square(np.diff(pixels, axis=1)).mean() / (2 * variance)
    colour = (pixels - pixels.mean(-1, keepdims=True)).var(axis=(0, 1)).mean()
    steady = contrast.std() < STEADY_CONTRAST * contrast.mean() and coarse < COARSE_SHARE * variance
    if steady and (neighbours < UNRELATED or colour > COLOURFUL * variance):
        return f"static noise: neighbouring pixels correlate by {neighbours:.2f}, and no part differs from another"
    return None


def _tiles(pixels: Pixels, count: int) -> Pixels:
    """[count, rows, count, columns, 3]: the picture cut into count x count tiles, what is over left out."""
    rows, columns = (side // count for side in pixels.shape[:2])
    return pixels[: rows * count, : columns * count].reshape(count, rows, count, columns, 3)


CHECKS: tuple[Callable[[Pixels], str | None], ...] = (_constant, _noise, _saturated)
