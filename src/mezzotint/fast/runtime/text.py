"""Refine a prompt's text once, and not in every step.

Z-Image's text goes through blocks of its own before it is concatenated with the image.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezzotint.families.recipe import TextRefiner
from mezzotint.fast.runtime.tensor_cache import TensorCache
from mezzotint.fast.runtime.weight_watcher import WeightWatcher
from mezzotint.nn import modes_of


class CachedTextRefiner:
    """The forward of a transformer. It refines text, and passes it to the wrapped forward.

    In-place changes to weights are not detected.
    """

    def __init__(self, model: nn.Module, refiner: TextRefiner) -> None:
        self.model, self.function, self.refiner = model, model.forward, refiner
        self.modes = modes_of(model)
        self.original_forward = MethodType(type(model).forward, model)
        self.__signature__ = self.signature = inspect.signature(self.original_forward)
        self.cache = TensorCache()
        parts = [model.get_submodule(name) for name in (refiner.embedder, refiner.blocks)]
        self.watcher = WeightWatcher(nn.ModuleList(parts))
        self.bypass: dict[str, nn.Module] = {
            refiner.embedder: nn.Identity(),
            refiner.blocks: nn.ModuleList(),
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.signature.bind(*args, **kwargs)
        text = call.arguments[self.refiner.text_argument]
        if any(isinstance(part, list) for part in text):  # images between the texts
            return self.function(*args, **kwargs)
        call.arguments[self.refiner.text_argument] = self.refined_text(call)
        with override_attributes(self.model, **self.bypass):
            return self.function(*call.args, **call.kwargs)

    def reset(self) -> None:
        """Forget refined text."""
        self.cache.clear()

    def precompute(self, *args: Any, **kwargs: Any) -> None:
        """Refine the text of a call with these arguments."""
        self.refined_text(self.signature.bind(*args, **kwargs))

    def refined_text(self, call: inspect.BoundArguments) -> list[Tensor]:
        """Return the refined text of a call, from the cache if it is there."""
        if self.watcher.has_changed():
            self.cache.clear()
        leaves = pytree.tree_leaves(call.arguments)
        settings = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        state = self.modes.key, settings
        text = call.arguments[self.refiner.text_argument]
        refined: list[Tensor] = self.cache.get_or_compute(
            text, state, lambda: self._run_refiner(call)
        )
        return refined

    @torch.no_grad()
    def _run_refiner(self, call: inspect.BoundArguments) -> list[Tensor]:
        """Run the model until it concatenates text and image, without the image's own blocks."""
        join = inspect.signature(getattr(self.model, self.refiner.join))

        def stop(*args: Any, **kwargs: Any) -> None:
            raise _SequenceBuilt(join.bind(*args, **kwargs).arguments)

        stops = {self.refiner.image_blocks: nn.ModuleList(), self.refiner.join: stop}
        with override_attributes(self.model, **stops):
            try:
                self.original_forward(*call.args, **call.kwargs)
            except _SequenceBuilt as built:
                return self._cut_padding(built.arguments)
        name = type(self.model).__name__
        raise LookupError(f"{name} did not call its {self.refiner.join}")

    def _cut_padding(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        # The model pads texts to a multiple before `join`, and pads them again in each call.
        texts, lengths = (
            arguments[name] for name in (self.refiner.join_text, self.refiner.join_lengths)
        )
        return [text[:length].contiguous() for text, length in zip(texts, lengths, strict=True)]


class _SequenceBuilt(Exception):
    """Carries the arguments of `join` out of the model's forward."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


@contextmanager
def override_attributes(model: nn.Module, **attributes: Any) -> Iterator[None]:
    """Set attributes of a model while the context is open."""
    previous = {name: getattr(model, name) for name in attributes}
    for name, value in attributes.items():
        setattr(model, name, value)
    try:
        yield
    finally:
        for name, value in previous.items():
            if isinstance(value, MethodType):  # a method belongs to the class
                delattr(model, name)
            else:
                setattr(model, name, value)
