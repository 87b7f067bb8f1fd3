"""Warn in the log before a fast model compiles for a new input shape."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

LOG = logging.getLogger(__name__)


class RecompileWarning:
    """The forward of a model. It warns of every new input shape but the first.

    It must be the innermost wrapper of `model.forward`, to see the shapes that are compiled for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.function = model.forward
        self.name, self.__signature__ = type(model).__name__, inspect.signature(model.forward)
        self.seen_shapes: list[dict[str, str]] = []
        self.last_shapes: dict[str, str] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._warn_on_new_shapes(self.__signature__.bind(*args, **kwargs).arguments)
        return self.function(*args, **kwargs)

    def _warn_on_new_shapes(self, arguments: Mapping[str, Any]) -> None:
        leaves = pytree.tree_leaves_with_path(arguments)
        shapes = {_name(path): _shape(leaf) for path, leaf in leaves if isinstance(leaf, Tensor)}
        if shapes not in self.seen_shapes:
            if self.seen_shapes:  # the first shape compiles too, as the user expects
                LOG.warning(
                    "%s compiles for a new input shape: %s. "
                    "`mezzotint warmup --size` does it ahead of time.",
                    self.name,
                    ", ".join(_changes(self.last_shapes, shapes)),
                )
            self.seen_shapes.append(shapes)
        self.last_shapes = shapes


def _changes(last: dict[str, str], new: dict[str, str]) -> list[str]:
    names = [name for name in last | new if last.get(name) != new.get(name)]
    return [f"{name} {last.get(name, 'absent')} -> {new.get(name, 'absent')}" for name in names]


def _name(path: Any) -> str:
    """Return a name such as hidden_states, or cap_feats[0]."""
    first, *rest = path
    return f"{first.key}{pytree.keystr(tuple(rest))}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
