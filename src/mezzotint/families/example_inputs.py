"""Random arguments for one call of a transformer."""

import torch
from torch import Tensor

from mezzotint.families.sampling import Sampling

EXAMPLE_TEXT_TOKENS = 512
"""Text tokens of an example."""


def packed_size(sampling: Sampling) -> tuple[int, int]:
    """Return the tokens along the height and width: 8 pixels to a latent, 2 latents to a token."""
    return sampling.height // 16, (sampling.width or sampling.height) // 16


def latent_size(sampling: Sampling) -> tuple[int, int]:
    """Return height and width in latents of 8 pixels."""
    return sampling.height // 8, (sampling.width or sampling.height) // 8


def position_ids(height: int, width: int, axes: int) -> Tensor:
    """Return the positions of image tokens, row by row: float32 [height * width, axes].

    Axis 1 holds the row and axis 2 the column; the others are 0.
    """
    ids = torch.zeros(height, width, axes)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)[None, :]
    return ids.flatten(0, 1)
