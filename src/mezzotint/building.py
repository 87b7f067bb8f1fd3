"""Building what a configuration asks for: bounded before anything is allocated, and every failure named."""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from mezzotint.component_files import check_config, stored_files
from mezzotint.errors import MissingTensor, UnknownFormat, listed
from mezzotint.failures import failures_named
from mezzotint.pipeline_index import RESTORE, Component

MOST_MODULES = 6_000
"""Of one model: the largest that is known has 2,300."""
MOST_VALUES = 2**23
"""Of a model's buffers, and of parameters beyond those that its files hold: known models have less than 2**20."""
PER_BYTE = 16
"""Parameters that a model may have for each byte of its files: 4-bit weights have 2, and loading counts them twice."""
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


def load_component(component: Component, dtype: torch.dtype) -> Any:
    """Load a component as diffusers' pipelines do, from files that `check_component` has checked.

    dtype    of a model's parameters
    Raises   MezzotintError that names the component and its file, whatever the library raises
    """
    where = str(component.config_file)
    with failures_named(where, f"{component.name} cannot be loaded as a {component.class_name}", RESTORE):
        if component.base == "ModelMixin":
            return _load_model(component, torch_dtype=dtype)
        if component.base == "PreTrainedModel":
            return _load_model(component, dtype=dtype, trust_remote_code=False)
        return component.cls.from_pretrained(str(component.folder), local_files_only=True)


def _load_model(component: Component, **options: Any) -> nn.Module:
    """A model whose tensors are all in its files: the libraries fill what is missing with random numbers."""
    files = stored_files(component)
    safe = files[0].suffix == ".safetensors"
    with bounded(str(component.config_file), PER_BYTE * sum(file.stat().st_size for file in files)):
        model, found = component.cls.from_pretrained(
            str(component.folder), local_files_only=True, use_safetensors=safe, output_loading_info=True, **options
        )
    if found["missing_keys"]:
        raise MissingTensor(
            f"{component.folder}: {listed(sorted(found['missing_keys']), 4)}: not there, and {component.name} needs it",
            "download its files again; these may be of another model.",
        )
    loaded: nn.Module = model
    return loaded
