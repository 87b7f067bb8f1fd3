"""The sizes that a model can generate: latents consist of whole cells.

Pipelines of diffusers round other sizes down without an error, so that sizes are checked here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mezzotint.errors import BadRequest
from mezzotint.families.sampling import Sampling

PATCH = 2
"""Latent pixels along each side of a token."""
DOWNSAMPLING_LEVELS = 4
"""Levels of a VAE whose configuration does not list them: the default of AutoencoderKL."""


@dataclass(frozen=True)
class LatentGrid:
    """The pixels of one token, and the frames of one latent frame after the first."""

    height: int
    width: int
    frames: int = 1

    def check(self, sampling: Sampling) -> None:
        """Check that the sides and the frames are multiples of a cell.

        Raises   BadRequest, with the nearest valid sizes
        """
        sides = {"width": sampling.width or sampling.height, "height": sampling.height}
        for name, cell in (("width", self.width), ("height", self.height)):
            if sides[name] % cell:
                raise BadRequest(
                    f"the {name} is {sides[name]} pixels, and this model takes multiples of {cell}",
                    f"the nearest are {_nearest(sides[name], cell)}.",
                )
        frames = sampling.num_frames
        if frames is not None and (frames - 1) % self.frames:
            near = _nearest(frames - 1, self.frames, first=1)
            raise BadRequest(
                f"--frames is {frames}, and this model takes 1 plus multiples of {self.frames}",
                f"the nearest are {near}.",
            )


def image_latent_grid(vae: Mapping[str, Any], _transformer: Mapping[str, Any]) -> LatentGrid:
    """Return the grid of an image model whose VAE halves the sides at each level but the last.

    vae   configuration of an AutoencoderKL
    """
    levels = len(vae.get("block_out_channels") or range(DOWNSAMPLING_LEVELS))
    side = 2 ** (levels - 1) * PATCH
    return LatentGrid(side, side)


def _nearest(size: int, step: int, first: int = 0) -> str:
    """Return the multiples of `step` below and above, each plus `first`, without a size of 0."""
    below = size // step * step
    return " and ".join(
        str(number + first) for number in (below, below + step) if number + first > 0
    )
