"""FP8 weights (e4m3 or e5m2) with a scale per group of input columns.

The input is not quantized. A scale for each block of rows and columns is repeated for its rows.
"""

import torch
from torch import Tensor

from mezzotint.schemes.groups import scale_any_groups
from mezzotint.schemes.scheme import (
    COMMON_PARTS,
    FLOAT_DTYPES,
    ROTATION,
    Part,
    Parts,
    Scheme,
    per_any_group,
)


def decode_fp8_groups(parts: Parts) -> Tensor:
    """Dequantize a matrix: codes * block_scale.

    codes         float8_e4m3fn or float8_e5m2 [out, in]
    block_scale   [out, in/group]; its shape shows the group
    Returns       float32 [out, in]
    """
    return scale_any_groups(parts["codes"].float(), parts["block_scale"])


SCHEME = Scheme(
    name="fp8_groups",
    title="FP8 in groups",
    bits=8,
    usual_error=0.08,
    keeps_bias=True,
    parts={
        "codes": Part(
            (torch.float8_e4m3fn, torch.float8_e5m2),
            lambda out, in_: ((out, in_),),
            "8-bit float weights",
            rows=True,
            columns=True,
        ),
        "block_scale": Part(
            FLOAT_DTYPES,
            per_any_group,
            "one scale per group of columns",
            scale=True,
            rows=True,
            columns=True,
        ),
    },
    optional={"rotation": ROTATION} | COMMON_PARTS,
    decode=decode_fp8_groups,
)
