"""Execution modes: how layers and attention compute while a context is open, in the thread that opened it.

A mode belongs to a thread, so that requests on several threads do not change each other's images. It applies to
whatever model that thread calls.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mezzotint import kernels
from mezzotint.kernels import Backend


class Modes(threading.local):
    """The modes of the calling thread.

    torch.compile guards on attributes of a thread-local object, so that compiled code sees a change of mode. It can
    trace no ContextVar (2.13), and it takes attributes of the class for constants: every mode is set in `__init__`,
    which runs anew in each thread.

    backend           what `use_backend` has set
    unrounded         whether `unrounded_inputs` is open
    exact_attention   whether `exact_attention` is open
    """

    def __init__(self) -> None:
        self.backend: Backend | None = None
        self.unrounded = False
        self.exact_attention = False


modes = Modes()


@contextmanager
def _set(name: str, value: Any) -> Iterator[None]:
    """Set one mode while the context is open."""
    before = getattr(modes, name)
    setattr(modes, name, value)
    try:
        yield
    finally:
        setattr(modes, name, before)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every quantized linear that this thread calls on one backend while the context is open.

    Raises   BadRequest if no backend has this name

    >>> with use_backend("reference"):
    ...     expected = layer(x)
    """
    with _set("backend", kernels.named(name)):
        yield


@contextmanager
def unrounded_inputs() -> Iterator[None]:
    """Multiply inputs as they are by decoded weights, in every quantized linear that this thread calls.

    Where weights have backends of their own for that, a layer takes none: nothing is prepared for a few calls.
    """
    with _set("unrounded", True):
        yield


@contextmanager
def exact_attention() -> Iterator[None]:
    """Compute FP8 attention in BF16 in this thread while the context is open; any other is what it is."""
    with _set("exact_attention", True):
        yield


def attention_is_exact() -> bool:
    """Return whether `exact_attention` is open in this thread."""
    return modes.exact_attention


def overrides() -> tuple[str | None, bool]:
    """Return what `use_backend` and `unrounded_inputs` have set in this thread.

    A layer's product depends on nothing else besides its input.
    """
    return None if modes.backend is None else modes.backend.name, modes.unrounded
