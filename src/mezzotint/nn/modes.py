"""Execution modes: how the layers and the attention of a model compute inside a context."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mezzotint import kernels
from mezzotint.errors import BadRequest
from mezzotint.kernels import Backend

ModesKey = tuple[str | None, bool, bool]
"""Backend override, BF16 activations, BF16 attention: the key of CUDA graphs and caches."""


class ExecutionModes:
    """The execution modes of one model, shared by all its layers.

    Compiled code reads these attributes from the layer, so torch.compile guards on them and notices
    a change. Only one thread at a time may change them or run the model; see `exclusive`. A copy
    starts with the defaults.

    backend           backend override, or None for the backend that each layer selected
    bf16_activations  True if layers do not quantize their inputs
    bf16_attention    True if FP8 attention runs in BF16
    attention         the attention that the model was given, which `fast` records here, or None
    """

    def __init__(self) -> None:
        self.backend: Backend | None = None
        self.bf16_activations = False
        self.bf16_attention = False
        self.attention: object | None = None
        self._lock = threading.RLock()

    @property
    def key(self) -> ModesKey:
        """Return the modes as a hashable value."""
        name = None if self.backend is None else self.backend.name
        return name, self.bf16_activations, self.bf16_attention

    @property
    def layers_as_loaded(self) -> bool:
        """Return whether layers run on their own backends and quantize their inputs as stored."""
        return self.backend is None and not self.bf16_activations

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other threads from changing the modes while the context is open.

        Raises   BadRequest if another thread has such a context open
        """
        # Waiting could deadlock: the other thread may itself wait for this one's pipeline.
        if not self._lock.acquire(blocking=False):
            raise BadRequest(
                "another thread runs this model, or has changed its execution modes",
                "wait until it is done, or load the model once for each thread.",
            )
        try:
            yield
        finally:
            self._lock.release()

    def __reduce__(self) -> Any:
        return ExecutionModes, ()


def modes_of(model: nn.Module) -> ExecutionModes:
    """Return the modes of a model, and let all its layers share them.

    A layer shares the modes of its model, so modes of a part of a model are those of the model.
    """
    holders = [module for module in model.modules() if _modes(module) is not None]
    modes = (_modes(holders[0]) if holders else None) or ExecutionModes()
    for module in (model, *holders):
        if _modes(module) is not modes:
            module.modes = modes  # type: ignore[assignment]
    return modes


def _modes(module: nn.Module) -> ExecutionModes | None:
    modes = vars(module).get("modes")
    return modes if isinstance(modes, ExecutionModes) else None


@contextmanager
def override_mode(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set one attribute of a model's ExecutionModes while the context is open.

    Raises   BadRequest if another thread runs the model or has changed its modes
    """
    modes = modes_of(model)
    with modes.exclusive():
        previous = getattr(modes, name)
        setattr(modes, name, value)
        try:
            yield
        finally:
            setattr(modes, name, previous)


@contextmanager
def use_backend(model: nn.Module, name: str) -> Iterator[None]:
    """Run every quantized linear of a model on one backend while the context is open.

    What the backend prepares for a layer is kept until the context ends.

    Raises   BadRequest if there is no such backend, or another thread runs the model

    >>> with use_backend(pipe.transformer, "reference"):
    ...     expected = generate(pipe, ["a cat"])
    """
    with override_mode(model, "backend", kernels.get_backend(name)):
        try:
            yield
        finally:
            for module in model.modules():
                if hasattr(type(module), "drop_preparations"):
                    module.drop_preparations()  # type: ignore[operator]


@contextmanager
def unquantized_activations(model: nn.Module) -> Iterator[None]:
    """Leave the inputs of a model's quantized linears in BF16 while the context is open.

    Each call dequantizes the weight. The weight-only or the reference backend runs, unprepared.

    Raises   BadRequest if another thread runs the model or has changed its modes
    """
    with override_mode(model, "bf16_activations", True):
        yield
