"""Make a loaded transformer fast: fuse, select attention, compile, and record CUDA graphs."""

from mezzotint.fast.compile_cache import compile_cache_folder
from mezzotint.fast.report import SpeedReport, UnfusedLayers
from mezzotint.fast.transformer import FastTransformer, speed_up

__all__ = [
    "FastTransformer",
    "SpeedReport",
    "UnfusedLayers",
    "compile_cache_folder",
    "speed_up",
]
