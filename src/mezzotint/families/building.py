"""A family's diffusers model on the meta device, from a configuration or from tensors' shapes.

The size of a model is limited before anything is allocated, and every error names the file.
"""

import importlib
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

from mezzotint.errors import MezzotintError, UnknownFormat
from mezzotint.families import find_family
from mezzotint.families.family import Family
from mezzotint.families.naming_scheme import Shapes
from mezzotint.untrusted.config_limits import check_config
from mezzotint.untrusted.library_failures import convert_errors

MAX_MODULES = 6_000
"""The largest known model has 2,300."""
MAX_VALUES = 2**23
"""For buffers, and for parameters beyond those in the files. Known models have less than 2**20."""
BUILD_HINT = "restore the config.json that came with these weights."


class _RegistrationLimit:
    """Counts what this thread's models register; raises UnknownFormat above the limits."""

    def __init__(self, where: str, parameters: int | None) -> None:
        self.where, self.thread = where, threading.get_ident()
        self.modules = self.parameters = self.buffers = 0
        self.max_parameters = None if parameters is None else parameters + MAX_VALUES

    def parameter(self, _module: nn.Module, _name: str, value: Tensor | None) -> None:
        if value is not None and self._is_this_thread():
            self.parameters += value.numel()
            self._check("parameters", self.parameters, self.max_parameters)

    def buffer(self, _module: nn.Module, _name: str, value: Tensor | None) -> None:
        if value is not None and self._is_this_thread():
            self.buffers += value.numel()
            self._check("values in buffers", self.buffers, MAX_VALUES)

    def module(self, _module: nn.Module, _name: str, value: nn.Module | None) -> None:
        if value is not None and self._is_this_thread():
            self.modules += 1
            self._check("modules", self.modules, MAX_MODULES)

    def _is_this_thread(self) -> bool:
        # PyTorch's registration hooks are global: models that other threads build run them too.
        return threading.get_ident() == self.thread

    def _check(self, what: str, number: int, limit: int | None) -> None:
        if limit is not None and number > limit:
            raise UnknownFormat(
                f"{self.where}: asks for more than {limit:,} {what}, which no such model has",
                BUILD_HINT,
            )


@contextmanager
def bounded(where: str, parameters: int | None = None) -> Iterator[None]:
    """Bound the size of the models that this thread builds while the context is open.

    parameters   maximum number of values in all parameters, or None for any number
    Raises       UnknownFormat as soon as modules, buffers or parameters exceed their limit
    """
    limit = _RegistrationLimit(where, parameters)
    handles = [
        hooks.register_module_parameter_registration_hook(limit.parameter),
        hooks.register_module_buffer_registration_hook(limit.buffer),
        hooks.register_module_module_registration_hook(limit.module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build_meta_model(
    class_name: str, config: Mapping[str, Any], where: str = "config.json"
) -> nn.Module:
    """Build a model class from its configuration with every parameter on the meta device.

    where    name of the configuration in an error
    Raises   UnknownFormat if diffusers cannot build it, or it asks for more than any model has
    """
    from accelerate import init_empty_weights

    entries = {key: value for key, value in config.items() if key != "quantization_config"}
    check_config(entries, where)
    with convert_errors(where, f"diffusers cannot build a {class_name} of it", BUILD_HINT):
        model_class = _model_class(class_name)
        _try_on_meta(model_class, entries, where)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = model_class.from_config(entries)
    return model


def _model_class(class_name: str) -> Any:
    """Return a class of diffusers, or of the module that its family names."""
    family = find_family(class_name)
    module = "diffusers" if family is None else family.module
    return getattr(importlib.import_module(module), class_name)


def _try_on_meta(
    model_class: Callable[..., nn.Module], entries: Mapping[str, Any], where: str
) -> None:
    """Build the model with buffers on the meta device, to check their sizes before allocation."""
    arguments = inspect.signature(model_class.__init__).parameters
    with bounded(where), torch.device("meta"):
        model_class(**{name: value for name, value in entries.items() if name in arguments})


@lru_cache(maxsize=8)
def _built(class_name: str, entries: str, where: str) -> nn.Module:
    return build_meta_model(class_name, json.loads(entries), where)


def outline_model(
    class_name: str, config: Mapping[str, Any], where: str = "config.json"
) -> nn.Module:
    """Return `build_meta_model`'s result, cached per configuration; callers must not fill it."""
    entries = {key: value for key, value in config.items() if key != "quantization_config"}
    return _built(class_name, json.dumps(entries, sort_keys=True), where)


def model_of_shapes(
    family: Family, shapes: Shapes, flags: Mapping[str, bool], where: str
) -> nn.Module:
    """Return the family's model whose tensors have these shapes, as far as any model has them.

    shapes   {diffusers name: shape}
    flags    entries of the configuration that follow from no shape
    where    the checkpoint, for messages
    Returns  a cached model; callers must not fill it
    Raises   MissingTensor, ShapeMismatch, UnknownFormat
    """
    try:
        config = family.config(shapes)
    except MezzotintError as error:
        raise error.with_location(where) from error
    return outline_model(
        family.transformer_class, {**config, **flags}, f"{where}: its tensors' shapes"
    )


def block_linears(model: nn.Module) -> set[str]:
    """Return names of the linears in the blocks that the model's class repeats."""
    repeated = tuple(getattr(model, "_repeated_blocks", ()))
    return {
        f"{prefix}.{name}"
        for prefix, block in model.named_modules()
        if type(block).__name__ in repeated
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }
