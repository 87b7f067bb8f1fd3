"""The interface of a backend: whether it can run a weight on a device, and the linear layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mezzotint.kernels.target import Target
from mezzotint.schemes import Scheme, Shape
from mezzotint.tensor import Layout, QuantTensor

QUANTIZED_ACTIVATIONS = "as_stored"
BF16_ACTIVATIONS = "bf16"
ACTIVATION_MODES = (QUANTIZED_ACTIVATIONS, BF16_ACTIVATIONS)
"""How a layer treats its input: quantized as the checkpoint specifies, or unchanged."""


@dataclass(frozen=True)
class Can:
    """The backend can run the weight."""


@dataclass(frozen=True)
class Cannot:
    """The backend cannot run the weight.

    reason    why, for reports
    library   the distribution to install, if that is all that is missing; otherwise empty
    """

    reason: str
    library: str = ""


@dataclass(frozen=True)
class WeightSpec:
    """The properties of a quantized weight that determine its backend; parts are {name: shape}."""

    scheme: Scheme
    shape: tuple[int, int]
    parts: Mapping[str, Shape]
    dynamic_input: bool = False

    @classmethod
    def of(cls, tensor: QuantTensor) -> "WeightSpec":
        """Return the spec of a weight."""
        shapes = {name: tuple(part.shape) for name, part in tensor.parts.items()}
        return cls(tensor.scheme, tensor.shape, shapes, tensor.dynamic_input)

    def quantizes_activation(self, activations: str) -> bool:
        """Return whether the layer's input is quantized in this activation mode."""
        return activations == QUANTIZED_ACTIVATIONS and self.scheme.quantizes_activation(
            self.parts, self.dynamic_input
        )


class Backend(Protocol):
    """One implementation of a quantized linear layer.

    name            the value of --backend
    priority        the backend with the highest value is selected, among those that can
    weight_layout   the layout that `linear` requires
    schemes         optional: the schemes that it supports, if not all; see `takes`
    """

    name: str
    priority: int
    weight_layout: Layout

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        """Return whether `linear` can run this weight on this device."""
        ...

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        """Derive what `linear` needs besides the parts, once per device.

        The result is stored as `weight.prepared`.
        """
        ...

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        """Compute x [..., in] @ weight.T + bias [out]; return [..., out] in x's dtype."""
        ...


def takes(backend: Backend, scheme: Scheme) -> bool:
    """Return whether the backend supports this scheme on any device."""
    return scheme in getattr(backend, "schemes", (scheme,))
