"""Backends, one file each, and the choice among them."""

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from mezzotint.discover import collect
from mezzotint.errors import BadRequest, Unsupported, there_are
from mezzotint.kernels.backend import (
    ACTIVATIONS,
    AS_STORED,
    BF16,
    GENERATIONS,
    Backend,
    Can,
    Cannot,
    Target,
    WeightSpec,
    best_device,
    device_of,
    takes,
)
from mezzotint.kernels.refusals import TRITON
from mezzotint.kernels.verified import is_verified
from mezzotint.schemes import SCHEMES, Scheme

__all__ = [
    "ACTIVATIONS",
    "AS_STORED",
    "BF16",
    "GENERATIONS",
    "Backend",
    "BackendChoice",
    "BackendUse",
    "Can",
    "Cannot",
    "Selection",
    "Target",
    "WITH_PYTORCH",
    "WeightSpec",
    "asked_for",
    "backends",
    "best_device",
    "check_choice",
    "count_uses",
    "decoder",
    "device_of",
    "named",
    "select",
    "takes",
]


WITH_PYTORCH = (TRITON.distribution,)
"""Libraries that are there wherever PyTorch is built for CUDA, whether or not this machine has them."""


@dataclass(frozen=True)
class Selection:
    """The backend that was chosen, and why each of the others of the scheme was not: {name: reason}.

    verified    a test has passed with it on a GPU of this generation
    libraries   {backend: library that it lacks here}, of the chosen one and of those that are preferred to it
    """

    backend: Backend
    declined: Mapping[str, str]
    verified: bool = True
    libraries: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BackendUse:
    """One choice of backend, and how many layers share it; `declined` is {backend: reason}.

    verified, libraries   as in `Selection`
    """

    scheme: str
    backend: str
    layers: int
    declined: Mapping[str, str]
    verified: bool = True
    libraries: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, scheme: Scheme, selection: Selection, layers: int = 1) -> "BackendUse":
        chosen = selection.backend.name
        return cls(scheme.name, chosen, layers, selection.declined, selection.verified, selection.libraries)

    @property
    def why(self) -> str:
        """Why each other backend declined: those of one reason together, what most of them say first."""
        names: dict[str, list[str]] = {}
        for name, reason in self.declined.items():
            names.setdefault(reason, []).append(name)
        ranked = sorted(names.items(), key=lambda said: -len(said[1]))
        return "; ".join(f"{', '.join(own)}: {reason}" for reason, own in ranked)


def count_uses(uses: Iterable[BackendUse]) -> tuple[BackendUse, ...]:
    """The same choices, equal ones as one with all their layers."""
    layers: dict[object, list[BackendUse]] = {}
    for use in uses:
        kind = (use.scheme, use.backend, tuple(use.declined.items()), use.verified, tuple(use.libraries.items()))
        layers.setdefault(kind, []).append(use)
    return tuple(replace(same[0], layers=sum(use.layers for use in same)) for same in layers.values())


@cache
def backends() -> dict[str, Backend]:
    """{name: backend}, discovered from the modules of this package."""
    return collect(sys.modules[__name__], "BACKEND")


def named(name: str) -> Backend:
    """The backend of this name; BadRequest lists those that exist."""
    if name not in backends():
        raise BadRequest(f"no backend is called {name!r}", there_are(name, backends()))
    return backends()[name]


BackendChoice = str | Mapping[str, str] | None
"""One backend for all layers, one for each scheme by name, or the best for each."""


def check_choice(choice: BackendChoice) -> None:
    """Raise BadRequest, listing those that exist, for the name of a backend or scheme that does not."""
    for scheme in choice if isinstance(choice, Mapping) else ():
        if scheme not in SCHEMES:
            raise BadRequest(f"no scheme is called {scheme!r}", there_are(scheme, SCHEMES))
    for name in choice.values() if isinstance(choice, Mapping) else filter(None, [choice]):
        named(name)


def asked_for(choice: BackendChoice, scheme: Scheme) -> str | None:
    """The backend that was asked for for layers of this scheme, or None."""
    return choice.get(scheme.name) if isinstance(choice, Mapping) else choice


def decoder(weight: WeightSpec, target: Target) -> Backend:
    """The fastest of the backends that decode the weight at each call, leave the input alone, and prepare nothing."""
    plain = (named("weight_only"), named("reference"))
    return next(backend for backend in plain if isinstance(backend.can(weight, target, BF16), Can))


def select(
    weight: WeightSpec,
    target: Target,
    activations: str = AS_STORED,
    only: str | None = None,
    presumed: Collection[str] = (),
) -> Selection:
    """The most preferred backend that can multiply by `weight` on `target`, or `only` that one if it can.

    presumed   libraries that count as installed, by name
    Raises     Unsupported with every reason if none can, BadRequest if `only` names no backend
    """
    declined: dict[str, str] = {}
    libraries: dict[str, str] = {}
    chosen: Backend | None = None
    for backend in _candidates(weight, only):
        if chosen is not None:
            declined[backend.name] = f"{chosen.name} is preferred"
            continue
        answer = backend.can(weight, target, activations)
        if isinstance(answer, Cannot) and answer.library:
            libraries[backend.name] = answer.library
        if isinstance(answer, Can) or answer.library in presumed:
            chosen = backend
        else:
            declined[backend.name] = answer.reason
    if chosen is None:
        reasons = "".join(f"\n    {name}: {reason}" for name, reason in declined.items())
        raise Unsupported(f"nothing can multiply by {weight.scheme.title} {weight.shape} on {target}:{reasons}")
    return Selection(chosen, declined, is_verified(weight.scheme.name, str(target), chosen.name), libraries)


def _candidates(weight: WeightSpec, only: str | None) -> list[Backend]:
    """Those that are for the weight's scheme, the most preferred first; or `only` the one that was asked for."""
    if only:
        return [named(only)]
    own = [backend for backend in backends().values() if takes(backend, weight.scheme)]
    return sorted(own, key=lambda backend: -backend.preference)
