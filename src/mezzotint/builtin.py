"""The models that come with the package: a small trained FLUX, and quantized copies of its transformer."""

from pathlib import Path

DATA = Path(__file__).parent / "data"
DEMO = "demo"
QUANTIZED = {
    "demo-fp8": DATA / "demo-fp8",
    "demo-nvfp4": DATA / "demo-nvfp4",
    "demo-nvfp4-comfy": DATA / "demo-nvfp4-comfy.safetensors",
}
"""Written by NVIDIA ModelOpt (the first two) and by comfy-kitchen; see tools/quantize_demo_with_modelopt.py."""


def resolve(name: str | Path) -> Path:
    """The path of a built-in model, or the path itself."""
    if str(name) == DEMO:
        return DATA / DEMO
    return QUANTIZED.get(str(name), Path(name))
