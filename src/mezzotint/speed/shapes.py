"""A word in the log before a fast model compiles for a new shape of input."""

import inspect
import logging
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

LOG = logging.getLogger(__name__)


class Announcer:
    """A forward pre-hook that warns of a shape of input that it has not seen, unless it is the first one."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []
        self.last: dict[str, str] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        leaves = pytree.tree_leaves_with_path(named)
        shapes = {_name(path): _shape(leaf) for path, leaf in leaves if isinstance(leaf, Tensor)}
        if shapes not in self.seen:
            if self.seen:
                LOG.warning(
                    "%s compiles anew for inputs of another shape: %s. `mezzotint warmup --size` does that ahead.",
                    type(module).__name__,
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
