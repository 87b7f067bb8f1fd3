"""A family's diffusers model on the meta device, from a configuration or from the shapes of a checkpoint's tensors."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from mezzotint.errors import MezzotintError, UnknownFormat
from mezzotint.families.family import Family
from mezzotint.families.spelling import Shapes

DEEPEST = 1000
"""Layers that a configuration may ask for: far more than any model has, and few enough to be built."""
UNBUILDABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What diffusers' classes raise on configurations that make no sense."""


def meta_model(class_name: str, config: Mapping[str, Any], where: str = "config.json") -> nn.Module:
    """The diffusers class built from its configuration with every parameter on the meta device.

    where    what the configuration is taken from, for messages
    Raises   UnknownFormat if diffusers cannot build it
    """
    import diffusers
    from accelerate import init_empty_weights

    entries = {key: value for key, value in config.items() if key != "quantization_config"}
    deep = [key for key, value in entries.items() if key.endswith("layers") and type(value) is int and value > DEEPEST]
    if deep:
        raise UnknownFormat(f"{where}: {deep[0]} is {entries[deep[0]]}, and no known model has more than {DEEPEST}")
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = getattr(diffusers, class_name).from_config(entries)
    except UNBUILDABLE as error:
        raise UnknownFormat(
            f"{where}: diffusers cannot build a {class_name} of it ({type(error).__name__}: {error})",
            "restore the config.json that came with these weights.",
        ) from error
    return model


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
