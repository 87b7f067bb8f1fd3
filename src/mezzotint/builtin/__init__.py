"""Resolve the name of a model to a path: built in, on disk, or on the Hub.

The built-in models are a small trained FLUX and quantized copies of its transformer.
"""

import errno
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mezzotint.errors import NotACheckpoint, did_you_mean
from mezzotint.hub import HUB_ID, AnyPath, hub_path

DATA = Path(__file__).parents[1] / "data"
DEMO = "demo"
QUANTIZED = ("demo-fp8", "demo-nvfp4", "demo-nvfp4-comfy")
"""Written by NVIDIA ModelOpt (the first two) and by comfy-kitchen; see demo_model/quantize.py."""

PIPELINE_INDEX = "model_index.json"
COMPONENT = "transformer"


def resolve(name: str | AnyPath) -> AnyPath:
    """Return the path of a built-in model, a file, a folder, or a Hub id.

    A Hub id is `owner/name[/path][@revision]`. It is resolved to one commit, by one request.

    Raises  NotACheckpoint if there is no such file, folder or repository; HubError
    """
    if not isinstance(name, str):
        return name
    if name == DEMO:
        pipeline: Path = demo_package().PIPELINE
        return pipeline
    if name in QUANTIZED:
        return _quantized_copy(name)
    check_exists(name)
    path = Path(name)
    return path if _exists(path) else hub_path(name) or path


def demo_package() -> Any:
    """Return the module of the package `mezzotint-demo`, which holds the built-in model.

    Raises  NotACheckpoint if it is not installed
    """
    try:
        return import_module("mezzotint_demo")
    except ModuleNotFoundError as error:
        raise NotACheckpoint(
            "the built-in model is not installed", "pip install mezzotint-demo"
        ) from error


def is_demo(path: AnyPath) -> bool:
    """Return whether `path` is the built-in pipeline."""
    return find_spec("mezzotint_demo") is not None and path == demo_package().PIPELINE


def _quantized_copy(name: str) -> Path:
    from mezzotint.builtin.copies import cached_copy  # imports PyTorch

    package = demo_package()
    recipe = package.COPIES / f"{name}.safetensors"
    return cached_copy(recipe, package.PIPELINE / COMPONENT)


def _exists(path: Path) -> bool:
    """Return whether a path exists. Raises NotACheckpoint if it is too long to be a path."""
    try:
        return path.exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise NotACheckpoint(f"{str(path)[:100]}...: is too long to be a path") from error
        raise


def check_exists(name: str) -> None:
    """Raise NotACheckpoint unless a name is built in, exists, or has the form of a Hub id.

    The Hub is not queried.
    """
    built_in = (DEMO, *QUANTIZED)
    if name in built_in or _exists(Path(name)) or HUB_ID.fullmatch(name):
        return
    known = f"built in are: {', '.join(built_in)}."
    raise NotACheckpoint(
        f"{name}: no such file or folder", f"{did_you_mean(name, built_in)}{known}"
    )


def is_pipeline(path: AnyPath) -> bool:
    """Return whether `path` is the folder of a diffusers pipeline."""
    return (path / PIPELINE_INDEX).is_file()


def component_folder(path: AnyPath, component: str | None = None) -> AnyPath:
    """Return `path`, or a component's folder in it.

    component   folder inside a pipeline; None for "transformer" in a pipeline, or for `path` itself
    Raises      NotACheckpoint if there is no folder of that name
    """
    inner = path / (component or COMPONENT)
    if component == COMPONENT and path.is_file():
        return path  # A single file's transformer is what is read of it.
    if component is not None and not inner.is_dir():
        raise NotACheckpoint(f"{path}: has no component {component}")
    return inner if component is not None or is_pipeline(path) else path


def matching_component(path: AnyPath, component: str | None) -> AnyPath:
    """Return the folder of a component in a pipeline, or `path` if it is not a pipeline."""
    return component_folder(path, component) if is_pipeline(path) else path
