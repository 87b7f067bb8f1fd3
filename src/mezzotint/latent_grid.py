"""Which sizes a model can generate: latents come in whole cells, and diffusers rounds down to them in silence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mezzotint.errors import BadRequest
from mezzotint.families import Sampling

WAN, QWEN_IMAGE = "AutoencoderKLWan", "AutoencoderKLQwenImage"
PATCH = 2
"""Latent pixels along each side of a token, where the transformer's configuration does not say."""


@dataclass(frozen=True)
class LatentGrid:
    """What one token stands for, in pixels, and how many frames follow the first one at a time."""

    height: int
    width: int
    frames: int = 1

    @classmethod
    def of(cls, vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> "LatentGrid":
        """The grid by the configurations of a pipeline's VAE and transformer, as its class works it out."""
        kind = vae.get("_class_name")
        if kind == WAN:
            side, frames = vae.get("scale_factor_spatial") or 8, vae.get("scale_factor_temporal") or 4
            _, rows, columns = transformer.get("patch_size") or (1, PATCH, PATCH)
            return cls(side * rows, side * columns, frames)
        if kind == QWEN_IMAGE:
            side = 2 ** len(vae.get("temperal_downsample") or (False, True, True))
        else:
            side = 2 ** (len(vae.get("block_out_channels") or range(4)) - 1)
        return cls(side * PATCH, side * PATCH)

    def check(self, sampling: Sampling) -> None:
        """Raise BadRequest, with the nearest sizes that can be, for sides or frames that are not whole cells."""
        sides = {"width": sampling.width or sampling.size, "height": sampling.size}
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
                f"--frames is {frames}, and this model takes 1 and {self.frames} at a time after it",
                f"the nearest are {near}.",
            )


def _nearest(given: int, step: int, first: int = 0) -> str:
    """The multiples of `step` below and above, each plus `first`; a side of 0 is none."""
    below = given // step * step
    return " and ".join(str(number + first) for number in (below, below + step) if number + first > 0)
