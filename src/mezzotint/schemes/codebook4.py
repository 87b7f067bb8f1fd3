"""4-bit codes that index a table of 16 values, with a float32 scale per group of input columns.

The input is not quantized. NF4 and FP4 of bitsandbytes are such codes; a file brings its table.
"""

import torch
from torch import Tensor

from mezzotint.schemes.groups import scale_any_groups
from mezzotint.schemes.minifloats import unpack_nibbles
from mezzotint.schemes.scheme import (
    COMMON_PARTS,
    FLOAT32,
    Part,
    Parts,
    Scheme,
    per_any_group,
)

CODES = 16


def decode_codebook4(parts: Parts) -> Tensor:
    """Dequantize a matrix: codebook[code] * block_scale.

    codes         uint8 [out, in/2], low nibble is the even column
    codebook      float32 [16]
    block_scale   float32 [out, in/group]; its shape shows the group
    Returns       float32 [out, in]
    Source        https://arxiv.org/abs/2305.14314 (QLoRA: NF4 and block scales)
    """
    table = parts["codebook"].float()
    return scale_any_groups(table[unpack_nibbles(parts["codes"]).int()], parts["block_scale"])


SCHEME = Scheme(
    name="codebook4",
    title="NF4 or FP4 (4-bit codebook)",
    bits=4,
    usual_error=0.25,
    keeps_bias=True,
    parts={
        "codes": Part(
            (torch.uint8,),
            lambda out, in_: ((out, in_ // 2),),
            "two codes a byte",
            rows=True,
            columns=True,
        ),
        # A doubly quantized scale of bitsandbytes can come out negative.
        "block_scale": Part(
            FLOAT32,
            per_any_group,
            "one scale per group of columns",
            scale=True,
            signed=True,
            rows=True,
            columns=True,
        ),
        "codebook": Part(FLOAT32, lambda _out, _in: ((CODES,),), "value of each code"),
    },
    optional=COMMON_PARTS,
    decode=decode_codebook4,
)
