"""The backends that a layer runs on, selected for one kind of device."""

from dataclasses import dataclass

import torch

from mezzotint import kernels
from mezzotint.kernels import Backend, Selection, Target, WeightSpec
from mezzotint.tensor import QuantTensor

STORAGE_DEVICES = ("cpu", "meta")


@dataclass(frozen=True)
class LayerBackends:
    """What a layer runs on while its parts are on one kind of device.

    bf16_activations   backend for BF16 activations, or None if the layer never quantizes its input
    """

    device_type: str
    selection: Selection
    bf16_activations: Backend | None


def select_backends(
    weight: QuantTensor, device: torch.device, activations: str, backend_name: str | None
) -> LayerBackends:
    """Select the backends for a weight on a device.

    backend_name   the one backend to use, or None for the best
    Raises         Unsupported if no backend can run there
    """
    spec, target = WeightSpec.of(weight), Target.of(device)
    return LayerBackends(
        device.type,
        kernels.select(spec, target, activations, backend_name),
        kernels.select_bf16_backend(spec, target)
        if spec.quantizes_activation(activations)
        else None,
    )


def is_storage_device(device: torch.device) -> bool:
    """Return whether a layer that was made for an accelerator is only parked on this device."""
    return device.type in STORAGE_DEVICES
