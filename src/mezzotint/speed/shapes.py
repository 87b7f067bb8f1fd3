"""A word in the log before a fast model compiles for a new shape of input."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

LOG = logging.getLogger(__name__)


class Announced:
    """A model's forward, which warns of a shape of input that it has not seen, unless it is the first one.

    Whatever else `model.forward` is wrapped in comes around it, so that it sees the shapes that are compiled for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.function = model.forward
        self.name, self.__signature__ = type(model).__name__, inspect.signature(model.forward)
        self.seen: list[dict[str, str]] = []
        self.last: dict[str, str] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._look(self.__signature__.bind(*args, **kwargs).arguments)
        return self.function(*args, **kwargs)

    def _look(self, named: Mapping[str, Any]) -> None:
        leaves = pytree.tree_leaves_with_path(named)
        shapes = {_name(path): _shape(leaf) for path, leaf in leaves if isinstance(leaf, Tensor)}
        if shapes not in self.seen:
            if self.seen:
                LOG.warning(
                    "%s compiles anew for inputs of another shape: %s. `mezzotint warmup --size` does that ahead.",
                    self.name,
                    ", ".join(_changes(self.last, shapes)),
                )
            self.seen.append(shapes)
        self.last = shapes


def _changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return [f"{name} {before.get(name, 'absent')} -> {after.get(name, 'absent')}" for name in names]


def _name(path: Any) -> str:
    """Such as hidden_states, or cap_feats[0]."""
    first, *rest = path
    return f"{first.key}{pytree.keystr(tuple(rest))}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
