"""Load a pipeline's component with its library, within limits, completely, with named errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mezzotint.errors import MissingTensor, join_names
from mezzotint.families.building import bounded
from mezzotint.generation.component_files import stored_files
from mezzotint.generation.pipeline_index import Component
from mezzotint.untrusted.config_limits import RESTORE
from mezzotint.untrusted.library_failures import convert_errors

MAX_PARAMETERS_PER_BYTE = 16
"""Maximum parameters per byte of weight files. 4-bit weights have 2, which loading counts twice."""


def load_component(component: Component, dtype: torch.dtype) -> Any:
    """Load a component as diffusers' pipelines do, from files that `check_component` has checked.

    dtype    of a model's parameters
    Raises   MezzotintError that names the component and its file, for any error of the library
    """
    where = str(component.config_file)
    what = f"{component.name} cannot be loaded as a {component.class_name}"
    with _restore_default_dtype(), convert_errors(where, what, RESTORE):
        if component.base == "ModelMixin":
            return _load_model(component, torch_dtype=dtype)
        if component.base == "PreTrainedModel":
            return _load_model(component, dtype=dtype, trust_remote_code=False)
        return component.cls.from_pretrained(str(component.folder), local_files_only=True)


@contextmanager
def _restore_default_dtype() -> Iterator[None]:
    """Restore PyTorch's default dtype, which transformers 5.23 changes if loading fails."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _load_model(component: Component, **options: Any) -> nn.Module:
    """Load a model. Raises MissingTensor, where the libraries would use random numbers."""
    files = stored_files(component)
    safe = files[0].suffix == ".safetensors"
    limit = MAX_PARAMETERS_PER_BYTE * sum(file.stat().st_size for file in files)
    with bounded(str(component.config_file), limit):
        model, found = component.cls.from_pretrained(
            str(component.folder),
            local_files_only=True,
            use_safetensors=safe,
            output_loading_info=True,
            **options,
        )
    if found["missing_keys"]:
        raise MissingTensor(
            f"{component.folder}: {join_names(sorted(found['missing_keys']), 4)}: not there, and "
            f"{component.name} needs it",
            "download its files again; these may be of another model.",
        )
    loaded: nn.Module = model
    return loaded
