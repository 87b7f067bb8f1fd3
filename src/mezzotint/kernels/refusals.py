"""Why a backend cannot, in the words that a load report shows. Each function returns the reason, or None."""

from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import Protocol

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.schemes import Scheme


class Needed(Protocol):
    """A library that a backend needs: its name where packages come from, and why it cannot be used here, or None."""

    @property
    def distribution(self) -> str: ...

    def missing(self) -> str | None: ...


class Triton:
    """Triton, which PyTorch's builds for CUDA on Linux bring along."""

    distribution = "triton"

    def missing(self) -> str | None:
        return "needs Triton, which is not installed" if find_spec("triton") is None else None


TRITON = Triton()


def answer(*reasons: str | None, library: Needed | None = None) -> Can | Cannot:
    """Can, or Cannot for the first of the reasons that there are.

    library   what the backend needs besides; looked for last, where nothing else is in the way
    """
    found = next((reason for reason in reasons if reason is not None), None)
    if found is not None:
        return Cannot(found)
    absent = None if library is None else library.missing()
    return Can() if library is None or absent is None else Cannot(absent, library.distribution)


def other_scheme(weight: WeightSpec, *schemes: Scheme) -> str | None:
    if weight.scheme in schemes:
        return None
    return f"multiplies {' and '.join(scheme.title for scheme in schemes)} only, this is {weight.scheme.title}"


def other_gpu(target: Target, needed: str, suits: Callable[[tuple[int, int]], bool]) -> str | None:
    """needed   what a compute capability must be to suit, in words"""
    if target.kind != "cuda" or target.capability is None:
        return f"needs a CUDA GPU, this is {target}"
    return None if suits(target.capability) else f"needs {needed}, this is {target}"


def not_among(target: Target, gpus: Collection[tuple[int, int]], use: str) -> str | None:
    """use   what the compute capabilities `gpus` are there for, as in "FlashInfer has kernels for" """
    known = ", ".join(str(Target("cuda", gpu)) for gpu in gpus)
    return other_gpu(target, f"a GPU that {use} ({known})", gpus.__contains__)


def other_parts(weight: WeightSpec, applied: Collection[str]) -> str | None:
    """applied   the parts, besides those that every layer of the scheme has, that the backend does something with"""
    unknown = set(weight.parts) - set(weight.scheme.parts) - set(applied)
    return f"has no way to apply {', '.join(sorted(unknown))}" if unknown else None


def absent_parts(weight: WeightSpec, needed: Collection[str]) -> str | None:
    absent = set(needed) - set(weight.parts)
    return f"needs {', '.join(sorted(absent))}, which this layer does not have" if absent else None


def exact_input(weight: WeightSpec, activations: str, rounding: str) -> str | None:
    """rounding   what the backend rounds every input to"""
    if weight.quantizes_input(activations):
        return None
    return f"rounds the input to {rounding}, and the inputs of this layer are not quantized"


def odd_sides(weight: WeightSpec, rows: int, columns: int) -> str | None:
    """rows, columns   what the output and the input features must be multiples of"""
    if weight.shape[0] % rows == 0 and weight.shape[1] % columns == 0:
        return None
    return f"needs sides that are multiples of {rows} and {columns}, this is {weight.shape[0]} x {weight.shape[1]}"
