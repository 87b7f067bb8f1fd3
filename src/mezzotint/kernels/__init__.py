"""Backends, one file each, and the choice among them."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from mezzotint.discover import collect
from mezzotint.errors import BadRequest, Unsupported
from mezzotint.kernels.backend import ACTIVATIONS, AS_STORED, BF16, Backend, Can, Cannot, Target, WeightSpec

__all__ = [
    "ACTIVATIONS",
    "AS_STORED",
    "BF16",
    "Backend",
    "Can",
    "Cannot",
    "Selection",
    "Target",
    "WeightSpec",
    "backends",
    "named",
    "select",
]


@dataclass(frozen=True)
class Selection:
    """The backend that was chosen, and why each of the others was not: {name: reason}."""

    backend: Backend
    declined: Mapping[str, str]


@cache
def backends() -> dict[str, Backend]:
    """{name: backend}, discovered from the modules of this package."""
    return collect(sys.modules[__name__], "BACKEND")


def named(name: str) -> Backend:
    """The backend of this name; BadRequest lists those that exist."""
    if name not in backends():
        raise BadRequest(f"no backend is called {name!r}", f"there are: {', '.join(backends())}.")
    return backends()[name]


def select(weight: WeightSpec, target: Target, activations: str = AS_STORED, only: str | None = None) -> Selection:
    """The most preferred backend that can multiply by `weight` on `target`, or `only` that one if it can.

    Raises  Unsupported with every reason if none can, BadRequest if `only` names no backend
    """
    candidates = [named(only)] if only else sorted(backends().values(), key=lambda backend: -backend.preference)
    declined: dict[str, str] = {}
    chosen: Backend | None = None
    for backend in candidates:
        if chosen is not None:
            declined[backend.name] = f"{chosen.name} is preferred"
            continue
        answer = backend.can(weight, target, activations)
        if isinstance(answer, Can):
            chosen = backend
        else:
            declined[backend.name] = answer.reason
    if chosen is None:
        reasons = "".join(f"\n    {name}: {reason}" for name, reason in declined.items())
        raise Unsupported(f"nothing can multiply by {weight.scheme.title} {weight.shape} on {target}:{reasons}")
    return Selection(chosen, declined)
