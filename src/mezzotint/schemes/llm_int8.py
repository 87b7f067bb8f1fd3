"""LLM.int8() of bitsandbytes: INT8 weights and inputs, except for input columns with outliers."""

import torch
from torch import Tensor

from mezzotint.schemes.groups import replace_zero_with_one
from mezzotint.schemes.int8 import INT8_MAX
from mezzotint.schemes.scheme import COMMON_PARTS, FLOAT32, Part, Parts, Scheme, scalar

INVERSE_MAX = 7.874015718698502e-3
"""1 / 127 as a float32 number, by which bitsandbytes multiplies."""


def decode_llm_int8(parts: Parts) -> Tensor:
    """Dequantize a matrix: codes * row_amax * (1 / 127), in this order of rounding.

    codes      int8 [out, in]
    row_amax   float32 [out], largest magnitude of each row (bitsandbytes: SCB)
    Returns    float32 [out, in]
    Source     bitsandbytes' int8_vectorwise_dequant
    """
    return parts["codes"].float() * parts["row_amax"].float().reshape(-1, 1) * INVERSE_MAX


def quantize_activation_llm_int8(x: Tensor, parts: Parts) -> Tensor:
    """Quantize x to INT8 with amax / 127 of each row; a column with an outlier stays as it is.

    An outlier has a magnitude of at least outlier_threshold. It does not count for the row's amax.
    The columns are those of all rows of x together.

    Returns   float32 of x's shape, dequantized
    Source    bitsandbytes' int8_vectorwise_quant; https://arxiv.org/abs/2208.07339
    """
    x = x.float()
    outliers = torch.zeros_like(x, dtype=torch.bool)
    if "outlier_threshold" in parts:
        outliers = x.abs() >= parts["outlier_threshold"].float()
    amax = x.masked_fill(outliers, 0.0).abs().amax(-1, keepdim=True)
    codes = torch.round(x * (INT8_MAX / replace_zero_with_one(amax)))
    columns = outliers.reshape(-1, x.shape[-1]).any(0)
    return torch.where(columns, x, codes * (amax / INT8_MAX))


SCHEME = Scheme(
    name="llm_int8",
    title="LLM.int8()",
    bits=8,
    usual_error=0.08,
    keeps_bias=True,
    parts={
        "codes": Part(
            (torch.int8,), lambda out, in_: ((out, in_),), "int8 weights", rows=True, columns=True
        ),
        "row_amax": Part(
            FLOAT32,
            lambda out, _in: ((out,),),
            "largest magnitude of each row",
            scale=True,
            rows=True,
        ),
    },
    optional={
        "outlier_threshold": Part(
            FLOAT32, scalar, "magnitude from which an input stays unquantized", scale=True
        )
    }
    | COMMON_PARTS,
    decode=decode_llm_int8,
    quantize_activation=quantize_activation_llm_int8,
)
