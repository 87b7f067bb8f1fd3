"""Requirements of backends.

Each function returns why a weight or device does not meet one, or None. Load reports show the
reasons.
"""

from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from typing import Protocol

from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.ops import nvrtc
from mezzotint.kernels.target import Target
from mezzotint.schemes import Scheme


class RequiredLibrary(Protocol):
    """A library that a backend needs, and its name on the package index."""

    @property
    def distribution(self) -> str: ...

    def unavailable_reason(self) -> str | None:
        """Return why the library cannot be used, or None."""
        ...


class Triton:
    """Triton, which PyTorch's builds for CUDA on Linux include."""

    distribution = "triton"

    def unavailable_reason(self) -> str | None:
        return "needs Triton, which is not installed" if find_spec("triton") is None else None


class NVRTC:
    """NVIDIA's compiler and driver for Python, which come with PyTorch's builds for CUDA."""

    distribution = "cuda-bindings"

    def unavailable_reason(self) -> str | None:
        return nvrtc.missing_library()


TRITON, NVRTC_LIBRARY = Triton(), NVRTC()


def check_requirements(
    *reasons: str | None, libraries: Sequence[RequiredLibrary] = ()
) -> Can | Cannot:
    """Return Can, or Cannot with the first reason that is not None.

    Libraries are checked last. So `Cannot.library` is set only if installing it is enough.
    """
    first = next((reason for reason in reasons if reason is not None), None)
    if first is not None:
        return Cannot(first)
    for library in libraries:
        unavailable = library.unavailable_reason()
        if unavailable is not None:
            return Cannot(unavailable, library.distribution)
    return Can()


def require_scheme(weight: WeightSpec, *schemes: Scheme) -> str | None:
    """Require one of the schemes."""
    if weight.scheme in schemes:
        return None
    titles = " and ".join(scheme.title for scheme in schemes)
    return f"supports {titles} only, this is {weight.scheme.title}"


def require_gpu(
    target: Target, needed: str, is_supported: Callable[[tuple[int, int]], bool]
) -> str | None:
    """Require a CUDA GPU whose compute capability is supported.

    needed   the requirement in words, for the message
    """
    if target.device_type != "cuda" or target.capability is None:
        return f"needs a CUDA GPU, this is {target}"
    return None if is_supported(target.capability) else f"needs {needed}, this is {target}"


def require_fp8_gpu(target: Target) -> str | None:
    """Require FP8 tensor cores: Ada, Hopper or newer."""
    return require_gpu(target, "FP8 tensor cores (sm_89 or newer)", lambda gpu: gpu >= (8, 9))


def require_int8_gpu(target: Target) -> str | None:
    """Require INT8 tensor cores: Turing or newer."""
    return require_gpu(target, "INT8 tensor cores (sm_75 or newer)", lambda gpu: gpu >= (7, 5))


def require_bf16_gpu(target: Target) -> str | None:
    """Require BF16 tensor cores: Ampere or newer."""
    return require_gpu(target, "BF16 tensor cores (sm_80 or newer)", lambda gpu: gpu >= (8, 0))


def require_gpu_in(target: Target, gpus: Collection[tuple[int, int]], use: str) -> str | None:
    """Require one of the compute capabilities.

    use   what the listed GPUs are for, as in "FlashInfer has kernels for"
    """
    names = ", ".join(str(Target("cuda", gpu)) for gpu in gpus)
    return require_gpu(target, f"a GPU that {use} ({names})", gpus.__contains__)


def require_known_parts(weight: WeightSpec, supported: Collection[str]) -> str | None:
    """Require that the layer has no optional parts besides the supported ones."""
    unknown = set(weight.parts) - set(weight.scheme.parts) - set(supported)
    return f"cannot apply {', '.join(sorted(unknown))}" if unknown else None


def require_parts(weight: WeightSpec, needed: Collection[str]) -> str | None:
    """Require parts that are optional in the scheme."""
    absent = set(needed) - set(weight.parts)
    return f"needs {', '.join(sorted(absent))}, which this layer does not have" if absent else None


def require_quantized_activation(
    weight: WeightSpec, activations: str, activation_format: str
) -> str | None:
    """Require a layer whose input is quantized.

    activation_format   what the backend quantizes every input to, for the message
    """
    if weight.quantizes_activation(activations):
        return None
    return (
        f"quantizes inputs to {activation_format}, and the inputs of this layer are not quantized"
    )


def require_multiple_of(weight: WeightSpec, out_multiple: int, in_multiple: int) -> str | None:
    """Require that output and input features are multiples of these numbers."""
    out_features, in_features = weight.shape
    if out_features % out_multiple == 0 and in_features % in_multiple == 0:
        return None
    return (
        f"needs dimensions that are multiples of {out_multiple} and {in_multiple}, "
        f"this is {out_features} x {in_features}"
    )
