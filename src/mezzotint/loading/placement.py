"""Where a loaded model lives, and in what form its weights stay there."""

from dataclasses import dataclass

import torch

from mezzotint.errors import require_known

AS_STORED_BITS, FP8 = "stored", "fp8"
RESIDENCY_MODES = (AS_STORED_BITS, FP8)
OFFLOAD_MODES = ("none",)


@dataclass(frozen=True)
class Placement:
    """The device of a model, and how its weights are kept there.

    device      where the weights are read to, and where the model runs
    residency   "stored" keeps weights as stored, "fp8" converts 4-bit and MXFP8 weights as they
                are read, None chooses
    offload     "none": everything stays on the device
    Raises      BadRequest for an unknown mode
    """

    device: torch.device
    residency: str | None = None
    offload: str = "none"

    def __post_init__(self) -> None:
        if self.residency is not None:
            require_known("residency mode", self.residency, RESIDENCY_MODES)
        require_known("offload mode", self.offload, OFFLOAD_MODES)
