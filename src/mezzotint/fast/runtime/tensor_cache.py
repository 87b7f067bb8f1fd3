"""A cache whose keys are tensors, compared by identity and version without asking the GPU."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

MAX_ENTRIES = 4
"""Entries kept: prompt and negative prompt, each with and without quantized activations."""


class CacheEntry(NamedTuple):
    """A result, with the tensors and the state that it was computed from."""

    inputs: tuple[tuple[Any, int], ...]
    state: Any
    result: Any


class TensorCache:
    """The last few results of a function of tensors.

    A tensor counts as changed if it is another object, or if an in-place operation raised its
    version.
    """

    def __init__(self) -> None:
        self.entries: list[CacheEntry] = []

    def get_or_compute(
        self, tensors: Sequence[Tensor], state: Any, compute: Callable[[], Any]
    ) -> Any:
        """Return the cached result for these tensors and this state, or compute and cache it."""
        # Inference tensors have no version, so a change to them cannot be seen.
        if any(tensor.is_inference() for tensor in tensors):
            return compute()
        for entry in self.entries:
            if entry.state == state and _same(entry.inputs, tensors):
                return entry.result
        inputs = tuple((weakref.ref(tensor), tensor._version) for tensor in tensors)
        entry = CacheEntry(inputs, state, compute())
        self.entries = [*self.entries, entry][-MAX_ENTRIES:]
        return entry.result

    def clear(self) -> None:
        """Forget all results."""
        self.entries.clear()


def _same(inputs: Sequence[tuple[Any, int]], tensors: Sequence[Tensor]) -> bool:
    return len(inputs) == len(tensors) and all(
        reference() is tensor and version == tensor._version
        for (reference, version), tensor in zip(inputs, tensors, strict=True)
    )
