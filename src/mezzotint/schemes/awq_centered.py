"""AWQ W4A16 as comfy-kitchen has it: the offset of a group belongs to code 8, not to code 0.

The input is not quantized. Source: comfy-kitchen's TensorCoreAWQW4A16Layout
"""

import torch
from torch import Tensor

from mezzotint.schemes.awq import AWQ_GROUP
from mezzotint.schemes.groups import to_groups
from mezzotint.schemes.minifloats import unpack_nibbles
from mezzotint.schemes.scheme import COMMON_PARTS, FLOAT_DTYPES, Part, Parts, Scheme, per_group

MIDDLE = 8


def decode_awq_centered(parts: Parts) -> Tensor:
    """Dequantize an AWQ matrix: (code - 8) * block_scale + block_zero.

    codes         uint8 [out, in/2], values 0..15, low nibble is the even column
    block_scale   [out, in/64]
    block_zero    [out, in/64]
    Returns       float32 [out, in]
    """
    groups = to_groups(unpack_nibbles(parts["codes"]).float() - MIDDLE, AWQ_GROUP)
    scaled = groups * parts["block_scale"].float().unsqueeze(-1)
    return (scaled + parts["block_zero"].float().unsqueeze(-1)).flatten(-2)


SCHEME = Scheme(
    name="awq_centered",
    title="AWQ W4A16 (centered)",
    bits=4,
    usual_error=0.25,
    keeps_bias=True,
    group=AWQ_GROUP,
    parts={
        "codes": Part(
            (torch.uint8,),
            lambda out, in_: ((out, in_ // 2),),
            "two unsigned codes a byte",
            rows=True,
            columns=True,
        ),
        "block_scale": Part(
            FLOAT_DTYPES,
            per_group(AWQ_GROUP),
            "one scale per 64 columns",
            scale=True,
            rows=True,
            columns=True,
        ),
        "block_zero": Part(
            FLOAT_DTYPES, per_group(AWQ_GROUP), "one offset per 64 columns", rows=True, columns=True
        ),
    },
    optional=COMMON_PARTS,
    decode=decode_awq_centered,
)
