"""An undo log for what the passes change in a model."""

from collections.abc import Callable
from typing import Any

from torch import nn

ABSENT = object()
"""Marks an attribute that the object itself does not have, though its class may."""


class ModelEdits:
    """Changes to a model, and how to take them back.

    The log keeps modules that were replaced, but never a second copy of a weight: where several
    layers were fused, it keeps a function that splits the fused layer again.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: object, **attributes: Any) -> None:
        """Set attributes of a module or of another object."""
        for name, value in attributes.items():
            self.save(owner, name)
            setattr(owner, name, value)

    def save(self, owner: object, name: str) -> None:
        """Record an attribute, so that `undo` restores it whatever happens to it."""
        previous = _own_attribute(owner, name)
        self._undo.append(lambda: _restore(owner, name, previous))

    def replace_layer(
        self, block: nn.Module, path: str, layer: nn.Module, original: Callable[[], nn.Module]
    ) -> None:
        """Put `layer` at `path` in a block. `undo` puts back what `original()` returns then."""
        block.set_submodule(path, layer)
        self._undo.append(lambda: block.set_submodule(path, original()))

    def undo(self) -> None:
        """Take back all changes, the last one first, and forget them."""
        while self._undo:
            # Popped before it runs, so that the fused weight it refers to is freed right after.
            self._undo.pop()()


def _own_attribute(owner: object, name: str) -> Any:
    """Return an attribute of the object itself, or ABSENT if at most the class has it."""
    # nn.Module keeps submodules and buffers in tables, not among its attributes.
    for table in (vars(owner), *(vars(owner).get(kind, {}) for kind in ("_modules", "_buffers"))):
        if name in table:
            return table[name]
    return ABSENT


def _restore(owner: object, name: str, previous: Any) -> None:
    if previous is not ABSENT:
        setattr(owner, name, previous)
    elif _own_attribute(owner, name) is not ABSENT:
        delattr(owner, name)
