"""Which backend runs how many layers, for reports."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from mezzotint.kernels.selection import Selection
from mezzotint.schemes import Scheme


@dataclass(frozen=True)
class BackendUse:
    """The backend of a group of layers.

    layers                how many layers share it
    declined              {backend: reason} of the other backends
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
        """Return the use of a selected backend."""
        return cls(
            scheme.name,
            selection.backend.name,
            layers,
            selection.declined,
            selection.verified,
            selection.libraries,
        )

    @property
    def reasons(self) -> str:
        """Why the other backends declined, grouped by reason, the largest group first."""
        names: dict[str, list[str]] = {}
        for name, reason in self.declined.items():
            names.setdefault(reason, []).append(name)
        groups = sorted(names.items(), key=lambda group: -len(group[1]))
        return "; ".join(f"{', '.join(backends)}: {reason}" for reason, backends in groups)


def merge_uses(uses: Iterable[BackendUse]) -> tuple[BackendUse, ...]:
    """Merge equal uses and sum their layers."""
    groups: dict[object, list[BackendUse]] = {}
    for use in uses:
        # Layers of one scheme and backend may differ in why others declined, such as their shape.
        declined, libraries = tuple(use.declined.items()), tuple(use.libraries.items())
        key = (use.scheme, use.backend, declined, use.verified, libraries)
        groups.setdefault(key, []).append(use)
    return tuple(
        replace(group[0], layers=sum(use.layers for use in group)) for group in groups.values()
    )
