"""Weights that are not quantized and yet not the layer's own: a low-rank part or a factor stands beside them.

ModelOpt smooths every linear before it decides which to quantize, so that layers it leaves in BF16 are stored
transformed. Without the parts beside it such a weight is wrong by half and more.
"""

from torch import Tensor

from mezzotint.schemes.scheme import COMMON_PARTS, FLOAT_DTYPES, Part, Parts, Scheme


def decode_bf16(parts: Parts) -> Tensor:
    """The stored weights, float32 [out, in]."""
    return parts["codes"].float()


SCHEME = Scheme(
    name="bf16",
    title="BF16",
    bits=16,
    usual_error=0.02,
    parts={
        "codes": Part(
            FLOAT_DTYPES, lambda out, in_: ((out, in_),), "unquantized weights", rows=True
        )
    },
    optional=COMMON_PARTS,
    decode=decode_bf16,
)
