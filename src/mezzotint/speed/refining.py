"""Z-Image's text, which goes through blocks of its own before it meets the picture, refined once for each prompt."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezzotint.kernels.weights import Weights
from mezzotint.nn import attention_is_exact, overrides
from mezzotint.speed.remembered import Remembered


class Refined:
    """A transformer's forward, which is given refined text.

    Weights are taken not to change where they are.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.function = model, model.forward
        self.own = MethodType(type(model).forward, model)
        self.__signature__ = self.signature = inspect.signature(self.own)
        self.texts, self.weights = Remembered(), Weights(nn.ModuleList([model.cap_embedder, model.context_refiner]))
        self.without: dict[str, nn.Module] = {"cap_embedder": nn.Identity(), "context_refiner": nn.ModuleList()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.signature.bind(*args, **kwargs)
        if any(isinstance(part, list) for part in call.arguments["cap_feats"]):  # pictures among the text
            return self.function(*args, **kwargs)
        call.arguments["cap_feats"] = self.refined(call)
        with _instead(self.model, **self.without):
            return self.function(*call.args, **call.kwargs)

    def refined(self, call: inspect.BoundArguments) -> list[Tensor]:
        """The text of a call, kept from an earlier one if it can be."""
        if self.weights.changed():
            self.texts.forget()
        leaves = pytree.tree_leaves(call.arguments)
        settings = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        state = overrides(), attention_is_exact(), settings
        made: list[Tensor] = self.texts.of(call.arguments["cap_feats"], state, lambda: self._refine(call))
        return made

    @torch.no_grad()
    def _refine(self, call: inspect.BoundArguments) -> list[Tensor]:
        """Run the model as far as where text and picture meet, without what happens to the picture before."""
        names = inspect.signature(self.model._build_unified_sequence)

        def met(*args: Any, **kwargs: Any) -> None:
            raise _Met(names.bind(*args, **kwargs).arguments)

        with _instead(self.model, noise_refiner=nn.ModuleList(), _build_unified_sequence=met):
            try:
                self.own(*call.args, **call.kwargs)
            except _Met as both:
                texts, lengths = both.arguments["cap"], both.arguments["cap_seqlens"]
                return [text[:length].contiguous() for text, length in zip(texts, lengths, strict=True)]
        raise LookupError(f"{type(self.model).__name__} did without its _build_unified_sequence")


class _Met(Exception):
    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


@contextmanager
def _instead(model: Any, **others: Any) -> Iterator[None]:
    """Other attributes for a model, for as long as this lasts."""
    before = {name: getattr(model, name) for name in others}
    for name, value in others.items():
        setattr(model, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if isinstance(value, MethodType):
                delattr(model, name)
            else:
                setattr(model, name, value)


def refine_once(model: Any) -> bool:
    """Let a model's text be refined once for each prompt; whether it is one that refines it.

    Comes after whatever else `model.forward` is wrapped in, which sees refined text.
    """
    if not hasattr(model, "context_refiner"):
        return False
    model.forward = Refined(model)
    return True
