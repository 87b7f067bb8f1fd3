"""Quantization schemes of linear layers, one file each."""

from collections.abc import Mapping
from functools import cache

from mezzotint.discover import collect
from mezzotint.schemes.awq import SCHEME as AWQ_W4A16
from mezzotint.schemes.awq_centered import SCHEME as AWQ_CENTERED
from mezzotint.schemes.bf16 import SCHEME as BF16
from mezzotint.schemes.codebook4 import SCHEME as CODEBOOK4
from mezzotint.schemes.fp8 import SCHEME as FP8
from mezzotint.schemes.fp8_e5m2 import SCHEME as FP8_E5M2
from mezzotint.schemes.fp8_groups import SCHEME as FP8_GROUPS
from mezzotint.schemes.int4_rows import SCHEME as INT4_ROWS
from mezzotint.schemes.int4_rows_a8 import SCHEME as INT4_ROWS_A8
from mezzotint.schemes.int8 import SCHEME as INT8
from mezzotint.schemes.int_groups import SCHEMES as INT_GROUPS
from mezzotint.schemes.int_shifted import SCHEMES as INT_SHIFTED
from mezzotint.schemes.llm_int8 import SCHEME as LLM_INT8
from mezzotint.schemes.mxfp8 import SCHEME as MXFP8
from mezzotint.schemes.nvfp4 import SCHEME as NVFP4
from mezzotint.schemes.scheme import ANY_RANK, Part, Parts, Scheme, Shape
from mezzotint.schemes.svdquant_int4 import SCHEME as SVDQUANT_INT4
from mezzotint.schemes.svdquant_nvfp4 import SCHEME as SVDQUANT_NVFP4
from mezzotint.schemes.w4a8 import SCHEME as W4A8
from mezzotint.schemes.w6a8 import SCHEME as W6A8

__all__ = [
    "AWQ_CENTERED",
    "AWQ_W4A16",
    "BF16",
    "CODEBOOK4",
    "FP8",
    "FP8_E5M2",
    "INT4_ROWS",
    "INT4_ROWS_A8",
    "FP8_GROUPS",
    "INT8",
    "INT_GROUPS",
    "INT_SHIFTED",
    "LLM_INT8",
    "MXFP8",
    "NVFP4",
    "ANY_RANK",
    "SVDQUANT_INT4",
    "SVDQUANT_NVFP4",
    "W4A8",
    "W6A8",
    "Part",
    "Parts",
    "Scheme",
    "Shape",
    "encoders",
    "schemes",
]


@cache
def schemes() -> Mapping[str, Scheme]:
    """Return {name: scheme} of this package's modules and of plugins."""
    found = collect(__name__, "SCHEME")
    by_bits = (*INT_GROUPS.values(), *INT_SHIFTED.values())
    return dict(sorted((found | {scheme.name: scheme for scheme in by_bits}).items()))


def encoders() -> Mapping[str, Scheme]:
    """Return {name: scheme} of the schemes that encode weights."""
    return {name: scheme for name, scheme in schemes().items() if scheme.encode is not None}
