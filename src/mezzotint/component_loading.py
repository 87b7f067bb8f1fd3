"""Loading a pipeline's component with its library: bounded, complete, and every failure named."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mezzotint.component_files import stored_files
from mezzotint.config_limits import RESTORE
from mezzotint.errors import MissingTensor, listed
from mezzotint.failures import failures_named
from mezzotint.families.building import bounded
from mezzotint.pipeline_index import Component

PER_BYTE = 16
"""Parameters that a model may have for each byte of its files: 4-bit weights have 2, and loading counts them twice."""


def load_component(component: Component, dtype: torch.dtype) -> Any:
    """Load a component as diffusers' pipelines do, from files that `check_component` has checked.

    dtype    of a model's parameters
    Raises   MezzotintError that names the component and its file, whatever the library raises
    """
    where = str(component.config_file)
    what = f"{component.name} cannot be loaded as a {component.class_name}"
    with _default_dtype_kept(), failures_named(where, what, RESTORE):
        if component.base == "ModelMixin":
            return _load_model(component, torch_dtype=dtype)
        if component.base == "PreTrainedModel":
            return _load_model(component, dtype=dtype, trust_remote_code=False)
        return component.cls.from_pretrained(str(component.folder), local_files_only=True)


@contextmanager
def _default_dtype_kept() -> Iterator[None]:
    """Put PyTorch's default dtype back: transformers leaves its own where loading fails (5.23)."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
