"""Devices: where a layer runs, and which GPUs there are."""

from dataclasses import dataclass

import torch

from mezzotint.errors import BadRequest

HOPPER = 9
"""Major compute capability of Hopper."""


@dataclass(frozen=True)
class Target:
    """A device type and, for CUDA, its compute capability."""

    device_type: str
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, device: torch.device) -> "Target":
        """Return the target of a device; a CUDA device must exist on this machine."""
        if device.type != "cuda":
            return cls(device.type)
        if torch.version.hip:
            # ROCm reports its devices as "cuda", with different capability numbers.
            return cls("rocm")
        return cls("cuda", torch.cuda.get_device_capability(device))

    @property
    def is_hopper(self) -> bool:
        return self.capability is not None and self.capability[0] == HOPPER

    def __str__(self) -> str:
        if self.capability is None:
            return self.device_type
        major, minor = self.capability
        return f"sm_{major}{minor}"


GPU_GENERATIONS = {
    "RTX 20": Target("cuda", (7, 5)),
    "A100": Target("cuda", (8, 0)),
    "RTX 30": Target("cuda", (8, 6)),
    "RTX 40": Target("cuda", (8, 9)),
    "H100": Target("cuda", (9, 0)),
    "B200": Target("cuda", (10, 0)),
    "RTX 50": Target("cuda", (12, 0)),
}
"""{GPU name: target}, one per generation. Source: https://developer.nvidia.com/cuda-gpus"""


def best_device() -> torch.device:
    """Return the accelerator that PyTorch found, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def resolve_device(name: str | torch.device | None) -> torch.device:
    """Return the device with this name, or the best one for None. Raise BadRequest if absent."""
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadRequest(
            f"there is no device {name!r}", "use a name such as cpu, cuda or cuda:1."
        ) from error
    best = best_device()
    count = torch.accelerator.device_count() if device.type == best.type else 0
    if device.type not in ("cpu", "meta") and (device.index or 0) >= count:
        raise BadRequest(
            f"device is {name!r}, and PyTorch finds no such device here",
            f"the best available device is {best}.",
        )
    return device
