"""What was made of tensors, kept for as long as they are the same ones and unchanged: asked without the GPU."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

KEPT = 4
"""Results that are kept: for a prompt and for the one that guidance is against, with inputs rounded and unrounded."""


class Made(NamedTuple):
    """A result, and the tensors and the state that it was made of."""

    given: tuple[tuple[Any, int], ...]
    state: Any
    result: Any


class Remembered:
    """The last few results of a function of tensors.

    A tensor is another one if it is another object, or if it was changed in a way that counts up its version.
    """

    def __init__(self) -> None:
        self.results: list[Made] = []

    def of(self, tensors: Sequence[Tensor], state: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave for these tensors in this state, or gives now."""
        if any(tensor.is_inference() for tensor in tensors):  # those do not say whether they were changed
            return make()
        for kept in self.results:
            if kept.state == state and _same(kept.given, tensors):
                return kept.result
        made = Made(tuple((weakref.ref(tensor), tensor._version) for tensor in tensors), state, make())
        self.results = [*self.results, made][-KEPT:]
        return made.result

    def forget(self) -> None:
        self.results.clear()


def _same(given: Sequence[tuple[Any, int]], tensors: Sequence[Tensor]) -> bool:
    return len(given) == len(tensors) and all(
        kept() is tensor and version == tensor._version for (kept, version), tensor in zip(given, tensors, strict=True)
    )
