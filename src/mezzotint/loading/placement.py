"""Where a loaded model lives, and in what form its weights stay there."""

from dataclasses import dataclass

import torch

from mezzotint.errors import BadRequest, there_are

AS_STORED_BITS, FP8 = "stored", "fp8"
RESIDENCY_MODES = (AS_STORED_BITS, FP8)
OFFLOAD_MODES = ("none",)


@dataclass(frozen=True)
class Placement:
    """The device of a model, and how its weights are kept there.

    device      where the weights are read to, and where the model runs
    residency   "stored" keeps 4-bit weights, "fp8" converts them as they are read, None chooses
    offload     "none": everything stays on the device
    Raises      BadRequest for an unknown mode
    """

    device: torch.device
    residency: str | None = None
    offload: str = "none"

    def __post_init__(self) -> None:
        if self.residency is not None and self.residency not in RESIDENCY_MODES:
            raise BadRequest(
                f"resident is {self.residency!r}", there_are(self.residency, RESIDENCY_MODES)
            )
        if self.offload not in OFFLOAD_MODES:
            raise BadRequest(f"offload is {self.offload!r}", there_are(self.offload, OFFLOAD_MODES))
