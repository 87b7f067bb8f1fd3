"""The backends that exist, and the names by which users choose them."""

from collections.abc import Mapping
from functools import cache

from mezzotint.discover import collect
from mezzotint.errors import require_known
from mezzotint.kernels.backend import Backend
from mezzotint.schemes import Scheme, schemes

BackendChoice = str | Mapping[str, str] | None
"""One backend for all layers, {scheme: backend}, or None for the best of each."""


@cache
def all_backends() -> dict[str, Backend]:
    """Return {name: backend} of the modules of `kernels.backends` and of plugins.

    A plugin is another distribution with the entry point group mezzotint.backends.
    """
    return collect("mezzotint.kernels.backends", "BACKEND")


def get_backend(name: str) -> Backend:
    """Return the backend with this name. Raise BadRequest if there is none."""
    require_known("backend", name, all_backends())
    return all_backends()[name]


def check_backend_choice(choice: BackendChoice) -> None:
    """Raise BadRequest if a backend or scheme name does not exist."""
    for scheme in choice if isinstance(choice, Mapping) else ():
        require_known("scheme", scheme, schemes())
    for name in choice.values() if isinstance(choice, Mapping) else filter(None, [choice]):
        get_backend(name)


def backend_for_scheme(choice: BackendChoice, scheme: Scheme) -> str | None:
    """Return the requested backend for a scheme, or None."""
    return choice.get(scheme.name) if isinstance(choice, Mapping) else choice
