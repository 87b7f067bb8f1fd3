"""Integer weights of 2 or 4 bits whose groups have a scale and an offset, in the scales' dtype.

optimum-quanto rounds twice: the product of code and scale, and the difference to the offset. So the
dtype of the scales decides the weights. The input is not quantized.
Source: https://github.com/huggingface/optimum-quanto/blob/main/optimum/quanto/tensor/qbits.py
"""

from functools import partial

from torch import Tensor

from mezzotint.schemes.groups import split_groups
from mezzotint.schemes.int_groups import packed_codes, unpack_codes
from mezzotint.schemes.scheme import COMMON_PARTS, FLOAT_DTYPES, Part, Parts, Scheme, per_any_group

BITS = (2, 4)


def decode_int_shifted(parts: Parts, bits: int) -> Tensor:
    """Dequantize a matrix: code * block_scale - block_shift, rounded to their dtype after each.

    codes         uint8 [out, in * bits / 8], lowest bits first
    block_scale   [out, in/group]; its shape shows the group
    block_shift   [out, in/group], of the dtype of block_scale
    Returns       float32 [out, in]
    """
    scale, shift = parts["block_scale"].unsqueeze(-1), parts["block_shift"].unsqueeze(-1)
    codes = split_groups(unpack_codes(parts["codes"], bits), scale.shape[1]).to(scale.dtype)
    return (codes * scale - shift).flatten(-2).float()


def _int_shifted(bits: int) -> Scheme:
    per_group = partial(Part, FLOAT_DTYPES, per_any_group, rows=True, columns=True)
    return Scheme(
        name=f"int{bits}_shifted",
        title=f"INT{bits} in groups with offsets",
        bits=bits,
        usual_error=0.25 if bits == 4 else 0.6,
        keeps_bias=True,
        parts={
            "codes": packed_codes(bits),
            "block_scale": per_group(meaning="one scale per group of columns", scale=True),
            "block_shift": per_group(meaning="one offset per group of columns"),
        },
        optional=COMMON_PARTS,
        decode=lambda parts: decode_int_shifted(parts, bits),
    )


SCHEMES = {bits: _int_shifted(bits) for bits in BITS}
"""{bits of a code: scheme}"""
