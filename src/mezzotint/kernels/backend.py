"""What a backend is: it says whether it can multiply by a weight on a device, and multiplies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mezzotint.errors import BadRequest
from mezzotint.schemes import Scheme, Shape
from mezzotint.tensor import Layout, QuantTensor

AS_STORED = "as_stored"
BF16 = "bf16"
ACTIVATIONS = (AS_STORED, BF16)
"""How a layer's input enters the product: quantized as the checkpoint says, or left in the model's own dtype."""


@dataclass(frozen=True)
class Can:
    """The backend can."""


@dataclass(frozen=True)
class Cannot:
    """The backend cannot, and why.

    library   the only thing that it lacks, by the name it is installed under; empty where there is another reason
    """

    reason: str
    library: str = ""


HOPPER = 9
"""The first number of its compute capability."""


@dataclass(frozen=True)
class Target:
    """Where a product would run: a device kind and, for CUDA, its compute capability."""

    kind: str
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, device: torch.device) -> "Target":
        if device.type != "cuda":
            return cls(device.type)
        if torch.version.hip:  # AMD's devices are called cuda there, and number their capabilities otherwise
            return cls("rocm")
        return cls("cuda", torch.cuda.get_device_capability(device))

    @property
    def is_hopper(self) -> bool:
        return self.capability is not None and self.capability[0] == HOPPER

    def __str__(self) -> str:
        return self.kind if self.capability is None else f"sm_{self.capability[0]}{self.capability[1]}"


GENERATIONS = {
    "A100": Target("cuda", (8, 0)),
    "RTX 30": Target("cuda", (8, 6)),
    "RTX 40": Target("cuda", (8, 9)),
    "H100": Target("cuda", (9, 0)),
    "B200": Target("cuda", (10, 0)),
    "RTX 50": Target("cuda", (12, 0)),
}
"""{GPU that is known by its name: target}, one of each generation. Source: NVIDIA's table of compute capabilities"""


def best_device() -> torch.device:
    """The accelerator that PyTorch found, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of this name, or the best one for None. Raises BadRequest if there is none such here."""
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadRequest(f"no kind of device is called {name!r}", "cpu, cuda and cuda:1 are such names.") from error
    best = best_device()
    count = torch.accelerator.device_count() if device.type == best.type else 0
    if device.type not in ("cpu", "meta") and (device.index or 0) >= count:
        raise BadRequest(f"device is {name!r}, and PyTorch finds no such device here", f"the best it finds is {best}.")
    return device


@dataclass(frozen=True)
class WeightSpec:
    """A quantized weight as far as a choice of kernel depends on it: parts are {name: shape}."""

    scheme: Scheme
    shape: tuple[int, int]
    parts: Mapping[str, Shape]
    dynamic_input: bool = False

    @classmethod
    def of(cls, tensor: QuantTensor) -> "WeightSpec":
        shapes = {name: tuple(part.shape) for name, part in tensor.parts.items()}
        return cls(tensor.scheme, tensor.shape, shapes, tensor.dynamic_input)

    def quantizes_input(self, activations: str) -> bool:
        return activations == AS_STORED and self.scheme.quantizes_input(self.parts, self.dynamic_input)


class Backend(Protocol):
    """One way of multiplying by a quantized weight.

    preference   among those that can, the highest is taken
    wants        the layout that `linear` is given
    schemes      those that it multiplies, an attribute of backends that are not for all; see `takes`
    """

    name: str
    preference: int
    wants: Layout

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot: ...

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        """What `linear` needs besides the parts, worked out once on the weight's device: `weight.prepared` there."""
        ...

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        """x [..., in] times the weight, plus bias [out]; result [..., out] in x's dtype."""
        ...


def takes(backend: Backend, scheme: Scheme) -> bool:
    """Whether the backend is for this scheme at all, on whatever device."""
    return scheme in getattr(backend, "schemes", (scheme,))
