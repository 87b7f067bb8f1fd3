"""Unquantized weights that are stored transformed, with a low-rank branch or an input factor.

ModelOpt smooths every linear before it decides which ones to quantize, so it stores its BF16 layers
transformed. Without its other parts, such a weight has an error of 50 % and more.
"""

from torch import Tensor

from mezzotint.schemes.scheme import COMMON_PARTS, FLOAT_DTYPES, Part, Parts, Scheme


def decode_bf16(parts: Parts) -> Tensor:
    """Return the stored weights, float32 [out, in]."""
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
