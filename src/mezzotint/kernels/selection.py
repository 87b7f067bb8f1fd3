"""Select a backend for a weight on a device, and record why the others were declined."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mezzotint.errors import Unsupported
from mezzotint.kernels.backend import (
    BF16_ACTIVATIONS,
    QUANTIZED_ACTIVATIONS,
    Backend,
    Can,
    Cannot,
    WeightSpec,
    takes,
)
from mezzotint.kernels.discovery import all_backends, get_backend
from mezzotint.kernels.requirements import NVRTC_LIBRARY, TRITON
from mezzotint.kernels.target import Target
from mezzotint.kernels.verified import is_verified

WITH_PYTORCH = (TRITON.distribution, NVRTC_LIBRARY.distribution)
"""Libraries that every PyTorch build for CUDA includes, whether or not this machine has them."""


@dataclass(frozen=True)
class Selection:
    """The selected backend, and why each other backend of the scheme was declined.

    declined    {backend: reason}
    verified    whether a test has passed with the backend on a GPU of this generation
    libraries   {backend: missing library} of the selected backend and of preferred ones
    """

    backend: Backend
    declined: Mapping[str, str]
    verified: bool = True
    libraries: Mapping[str, str] = field(default_factory=dict)


def select(
    weight: WeightSpec,
    target: Target,
    activations: str = QUANTIZED_ACTIVATIONS,
    backend_name: str | None = None,
    presumed: Collection[str] = (),
) -> Selection:
    """Select the backend with the highest priority that can run `weight` on `target`.

    backend_name   consider only this backend
    presumed       names of libraries to treat as installed
    Raises         Unsupported with every reason if none can, BadRequest for an unknown name
    """
    declined: dict[str, str] = {}
    libraries: dict[str, str] = {}
    selected: Backend | None = None
    for backend in _candidates(weight, backend_name):
        if selected is not None:  # reports list the slower backends too
            declined[backend.name] = f"{selected.name} is preferred"
            continue
        answer = backend.can(weight, target, activations)
        if isinstance(answer, Cannot) and answer.library:
            libraries[backend.name] = answer.library
        if isinstance(answer, Can) or answer.library in presumed:
            selected = backend
        else:
            declined[backend.name] = answer.reason
    if selected is None:
        raise _unsupported(weight, target, declined)
    verified = is_verified(weight.scheme.name, str(target), selected.name)
    return Selection(selected, declined, verified, libraries)


def select_bf16_backend(weight: WeightSpec, target: Target) -> Backend:
    """Return the fastest backend that reads plain parts and does not quantize activations.

    It needs no large tensors prepared, so a layer can switch to it for one call.
    """
    for backend in map(get_backend, ("dequantize", "weight_only", "reference")):
        if isinstance(backend.can(weight, target, BF16_ACTIVATIONS), Can):
            return backend
    raise _unsupported(weight, target, {})


def _candidates(weight: WeightSpec, backend_name: str | None) -> list[Backend]:
    """Return the backends for the weight's scheme by descending priority, or the named one."""
    if backend_name:
        return [get_backend(backend_name)]
    candidates = [backend for backend in all_backends().values() if takes(backend, weight.scheme)]
    return sorted(candidates, key=lambda backend: -backend.priority)


def _unsupported(weight: WeightSpec, target: Target, declined: Mapping[str, str]) -> Unsupported:
    reasons = "".join(f"\n    {name}: {reason}" for name, reason in declined.items())
    return Unsupported(
        f"no backend can run {weight.scheme.title} {weight.shape} on {target}:{reasons}"
    )
