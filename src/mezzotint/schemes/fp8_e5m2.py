"""FP8 in e5m2: weights with two mantissa bits, and one scale per matrix or per output row.

Inputs stay unquantized. GPUs multiply e5m2 by e4m3, but never e5m2 by e5m2, so every engine widens
these weights first. Source: https://arxiv.org/abs/2209.05433, table 1
"""

import torch

from mezzotint.schemes.fp8 import decode_fp8
from mezzotint.schemes.scheme import COMMON_PARTS, FLOAT32, Part, Scheme, scalar_or_per_row

SCHEME = Scheme(
    name="fp8_e5m2",
    title="FP8 (e5m2)",
    bits=8,
    usual_error=0.16,
    keeps_bias=True,
    parts={
        "codes": Part(
            (torch.float8_e5m2,),
            lambda out, in_: ((out, in_),),
            "e5m2 weights",
            rows=True,
            columns=True,
        ),
        "weight_scale": Part(
            FLOAT32, scalar_or_per_row, "scale of the weights", scale=True, rows=True
        ),
    },
    optional=COMMON_PARTS,
    decode=decode_fp8,
)
