"""What the stored numbers mean: one file for each way of writing a linear layer's weights."""

from mezzotint.schemes.awq import AWQ_W4A16
from mezzotint.schemes.bf16 import BF16
from mezzotint.schemes.fp8 import FP8
from mezzotint.schemes.int8 import INT8
from mezzotint.schemes.mxfp8 import MXFP8
from mezzotint.schemes.nvfp4 import NVFP4
from mezzotint.schemes.scheme import RANK, Part, Parts, Scheme, Shape
from mezzotint.schemes.svdquant_int4 import SVDQUANT_INT4
from mezzotint.schemes.svdquant_nvfp4 import SVDQUANT_NVFP4

__all__ = [
    "AWQ_W4A16",
    "BF16",
    "FP8",
    "INT8",
    "MXFP8",
    "NVFP4",
    "RANK",
    "SCHEMES",
    "SVDQUANT_INT4",
    "SVDQUANT_NVFP4",
    "Part",
    "Parts",
    "Scheme",
    "Shape",
]

SCHEMES = {scheme.name: scheme for scheme in (AWQ_W4A16, BF16, FP8, INT8, MXFP8, NVFP4, SVDQUANT_INT4, SVDQUANT_NVFP4)}
