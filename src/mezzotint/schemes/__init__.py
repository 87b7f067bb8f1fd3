"""What the stored numbers mean: one file for each way of writing a linear layer's weights."""

from mezzotint.schemes.bf16 import BF16
from mezzotint.schemes.fp8 import FP8
from mezzotint.schemes.int8 import INT8
from mezzotint.schemes.mxfp8 import MXFP8
from mezzotint.schemes.nvfp4 import NVFP4
from mezzotint.schemes.scheme import Part, Parts, Scheme, Shape

__all__ = ["BF16", "FP8", "INT8", "MXFP8", "NVFP4", "SCHEMES", "Part", "Parts", "Scheme", "Shape"]

SCHEMES = {scheme.name: scheme for scheme in (BF16, FP8, INT8, MXFP8, NVFP4)}
