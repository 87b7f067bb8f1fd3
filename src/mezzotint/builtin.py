"""From names to paths: the models that come with the package, what is on disk, and what is on the Hub.

Built in are a small trained FLUX, and quantized copies of its transformer.
"""

import errno
from pathlib import Path

from mezzotint.errors import NotACheckpoint, did_you_mean
from mezzotint.hub import HUB_ID, AnyPath, hub_path

DATA = Path(__file__).parent / "data"
DEMO = "demo"
QUANTIZED = {
    "demo-fp8": DATA / "demo-fp8",
    "demo-nvfp4": DATA / "demo-nvfp4",
    "demo-nvfp4-comfy": DATA / "demo-nvfp4-comfy.safetensors",
}
"""Written by NVIDIA ModelOpt (the first two) and by comfy-kitchen; see tools/quantize_demo_with_modelopt.py."""

PIPELINE_INDEX = "model_index.json"
COMPONENT = "transformer"


def resolve(name: str | AnyPath) -> AnyPath:
    """The path of a built-in model, of a file or folder, or of a Hub id `owner/name[/path][@revision]`.

    Raises  NotACheckpoint if nothing here has the name, it can be a Hub id, and the Hub does not give it
    """
    if not isinstance(name, str):
        return name
    if name == DEMO:
        return DATA / DEMO
    check_exists(name)
    path = QUANTIZED.get(name, Path(name))
    return path if _exists(path) else hub_path(name) or path


def _exists(path: Path) -> bool:
    """Whether something is at `path`; what cannot be a path, because it is too long, is at none."""
    try:
        return path.exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise NotACheckpoint(f"{str(path)[:100]}...: is too long to be a path") from error
        raise


def check_exists(name: str) -> None:
    """Raise NotACheckpoint for what is no built-in model, not here, and cannot be a Hub id; the Hub is not asked."""
    built_in = (DEMO, *QUANTIZED)
    if name in built_in or _exists(Path(name)) or HUB_ID.fullmatch(name):
        return
    known = f"built in are: {', '.join(built_in)}."
    raise NotACheckpoint(f"{name}: no such file or folder", f"{did_you_mean(name, built_in)}{known}")


def is_pipeline(path: AnyPath) -> bool:
    """Whether `path` is the folder of a diffusers pipeline."""
    return (path / PIPELINE_INDEX).is_file()


def component_folder(path: AnyPath, component: str | None = None) -> AnyPath:
    """The component that is meant: `path` itself, or the named folder (or "transformer") inside a pipeline.

    Raises  NotACheckpoint if there is no folder of that name
    """
    inner = path / (component or COMPONENT)
    if component is not None and not inner.is_dir():
        raise NotACheckpoint(f"{path}: has no component {component}")
    return inner if component is not None or is_pipeline(path) else path


def counterpart(path: AnyPath, component: str | None) -> AnyPath:
    """Where a second model has what `component` is in the first: `path` itself, or that component of a pipeline."""
    return component_folder(path, component) if is_pipeline(path) else path
