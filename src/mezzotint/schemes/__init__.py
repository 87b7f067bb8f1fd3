"""What the stored numbers mean: one file for each way of writing a linear layer's weights."""

from mezzotint.schemes.fp8 import FP8
from mezzotint.schemes.nvfp4 import NVFP4
from mezzotint.schemes.scheme import Part, Parts, Scheme, Shape

__all__ = ["FP8", "NVFP4", "SCHEMES", "Part", "Parts", "Scheme", "Shape"]

SCHEMES = {scheme.name: scheme for scheme in (FP8, NVFP4)}
