"""GGUF Q5_K: blocks of 256 codes of 5 bits; 8 groups with a scale and a minimum of 6 bits."""

from torch import Tensor

from mezzotint.schemes.gguf_blocks import (
    BITS,
    LARGE,
    NIBBLES,
    block_scheme,
    fields,
    in_groups,
    scales_and_minima,
    to_floats,
    unpack,
)

GROUPS = 8


def decode_q5_k(blocks: Tensor) -> Tensor:
    """Decode code * scale - minimum: uint8 [..., 176] to float32 [..., 256]."""
    scale, minimum, groups, high, low = fields(blocks, 2, 2, 12, LARGE // 8, LARGE // 2)
    scales, minima = scales_and_minima(groups)
    codes = unpack(low, 32, NIBBLES) | unpack(high, 32, BITS) << 4
    values = in_groups(codes, GROUPS).float()
    units = to_floats(scale).unsqueeze(-1) * scales
    return (units * values - to_floats(minimum).unsqueeze(-1) * minima).flatten(-2)


SCHEME = block_scheme(
    "Q5_K",
    bits=5,
    group=LARGE,
    block_bytes=176,
    usual_error=0.12,
    scales_at=(0, 2),
    decode=decode_q5_k,
)
