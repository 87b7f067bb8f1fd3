"""From names to paths: the models that come with the package, what is on disk, and what is on the Hub.

Built in are a small trained FLUX, and quantized copies of its transformer.
"""

from pathlib import Path

from mezzotint.hub import HubPath, hub_path

DATA = Path(__file__).parent / "data"
DEMO = "demo"
QUANTIZED = {
    "demo-fp8": DATA / "demo-fp8",
    "demo-nvfp4": DATA / "demo-nvfp4",
    "demo-nvfp4-comfy": DATA / "demo-nvfp4-comfy.safetensors",
}
"""Written by NVIDIA ModelOpt (the first two) and by comfy-kitchen; see tools/quantize_demo_with_modelopt.py."""


def resolve(name: str | Path | HubPath) -> Path | HubPath:
    """The path of a built-in model, of a file or folder, or of a Hub id `owner/name[/path][@revision]`.

    Raises  NotACheckpoint if nothing here has the name, it can be a Hub id, and the Hub does not give it
    """
    if not isinstance(name, str):
        return name
    if name == DEMO:
        return DATA / DEMO
    path = QUANTIZED.get(name, Path(name))
    return path if path.exists() else hub_path(name) or path
