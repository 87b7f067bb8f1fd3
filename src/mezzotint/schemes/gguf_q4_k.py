"""GGUF Q4_K: blocks of 256 codes of 4 bits; 8 groups with a scale and a minimum of 6 bits."""

from torch import Tensor

from mezzotint.schemes.gguf_blocks import (
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


def decode_q4_k(blocks: Tensor) -> Tensor:
    """Decode code * scale - minimum: uint8 [..., 144] to float32 [..., 256]."""
    scale, minimum, groups, codes = fields(blocks, 2, 2, 12, LARGE // 2)
    scales, minima = scales_and_minima(groups)
    values = in_groups(unpack(codes, 32, NIBBLES), GROUPS).float()
    units = to_floats(scale).unsqueeze(-1) * scales
    return (units * values - to_floats(minimum).unsqueeze(-1) * minima).flatten(-2)


SCHEME = block_scheme(
    "Q4_K",
    bits=4,
    group=LARGE,
    block_bytes=144,
    usual_error=0.2,
    scales_at=(0, 2),
    decode=decode_q4_k,
)
