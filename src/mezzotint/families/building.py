"""A family's diffusers model on the meta device, from a configuration or from the shapes of a checkpoint's tensors.

What a configuration asks for is bounded before anything is allocated, and every failure is named.
"""

import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from mezzotint.config_limits import check_config
from mezzotint.errors import MezzotintError, UnknownFormat
from mezzotint.failures import failures_named
from mezzotint.families.family import Family
from mezzotint.families.spelling import Shapes

MOST_MODULES = 6_000
"""Of one model: the largest that is known has 2,300."""
MOST_VALUES = 2**23
"""Of a model's buffers, and of parameters beyond those that its files hold: known models have less than 2**20."""
BUILD_HINT = "restore the config.json that came with these weights."


class _Count:
    """What has been registered since building began; raises UnknownFormat where it is too much."""

    def __init__(self, where: str, parameters: int | None) -> None:
        self.where, self.thread = where, threading.get_ident()
        self.modules = self.parameters = self.buffers = 0
        self.most = None if parameters is None else parameters + MOST_VALUES

    def parameter(self, _module: nn.Module, _name: str, value: Tensor | None) -> None:
        if value is not None and self._is_mine():
            self.parameters += value.numel()
            self._check("parameters", self.parameters, self.most)

    def buffer(self, _module: nn.Module, _name: str, value: Tensor | None) -> None:
        if value is not None and self._is_mine():
            self.buffers += value.numel()
            self._check("values in buffers", self.buffers, MOST_VALUES)

    def module(self, _module: nn.Module, _name: str, value: nn.Module | None) -> None:
        if value is not None and self._is_mine():
            self.modules += 1
            self._check("modules", self.modules, MOST_MODULES)

    def _is_mine(self) -> bool:
        return threading.get_ident() == self.thread

    def _check(self, what: str, number: int, most: int | None) -> None:
        if most is not None and number > most:
            raise UnknownFormat(
                f"{self.where}: asks for more than {most:,} {what}, which no such model has", BUILD_HINT
            )


@contextmanager
def bounded(where: str, parameters: int | None = None) -> Iterator[None]:
    """Bound what the models built in this thread may hold while the context is open.

    parameters   most values of all parameters together, or None for any number
    Raises       UnknownFormat, as soon as modules, buffers or parameters are more than there can be
    """
    count = _Count(where, parameters)
    handles = [
        hooks.register_module_parameter_registration_hook(count.parameter),
        hooks.register_module_buffer_registration_hook(count.buffer),
        hooks.register_module_module_registration_hook(count.module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def meta_model(class_name: str, config: Mapping[str, Any], where: str = "config.json") -> nn.Module:
    """Build the diffusers class from its configuration with every parameter on the meta device.

    where    what the configuration is called in an error
    Raises   UnknownFormat if diffusers cannot build it, or it asks for more than any model has
    """
    import diffusers
    from accelerate import init_empty_weights

    entries = {key: value for key, value in config.items() if key != "quantization_config"}
    check_config(entries, where)
    with failures_named(where, f"diffusers cannot build a {class_name} of it", BUILD_HINT):
        model_class = getattr(diffusers, class_name)
        _try_on_meta(model_class, entries, where)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = model_class.from_config(entries)
    return model


def _try_on_meta(model_class: Callable[..., nn.Module], entries: Mapping[str, Any], where: str) -> None:
    """Build a model whose buffers have no values either: what they would take is known before it is allocated."""
    known = inspect.signature(model_class.__init__).parameters
    with bounded(where), torch.device("meta"):
        model_class(**{name: value for name, value in entries.items() if name in known})


@lru_cache(maxsize=8)
def _built(class_name: str, entries: str, where: str) -> nn.Module:
    return meta_model(class_name, json.loads(entries), where)


def outline_model(class_name: str, config: Mapping[str, Any], where: str = "config.json") -> nn.Module:
    """What `meta_model` gives, built once for each configuration: to be looked at, and never filled."""
    entries = {key: value for key, value in config.items() if key != "quantization_config"}
    return _built(class_name, json.dumps(entries, sort_keys=True), where)


def model_of_shapes(family: Family, shapes: Shapes, flags: Mapping[str, bool], where: str) -> nn.Module:
    """The family's model whose tensors, {diffusers name: shape}, have these shapes, as far as any has.

    flags    entries of the configuration that no shape follows from
    where    the checkpoint, for messages
    Returns  a model to be looked at, and never filled
    Raises   MissingTensor, ShapeMismatch, UnknownFormat
    """
    try:
        config = family.config(shapes)
    except MezzotintError as error:
        raise error.at(where) from error
    return outline_model(family.transformer, {**config, **flags}, f"{where}: its tensors' shapes")
