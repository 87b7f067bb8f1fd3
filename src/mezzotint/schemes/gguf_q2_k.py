"""GGUF Q2_K: blocks of 256 codes of 2 bits; 16 groups with a scale and a minimum of 4 bits."""

from torch import Tensor

from mezzotint.schemes.gguf_blocks import (
    LARGE,
    PAIRS,
    block_scheme,
    fields,
    in_groups,
    to_floats,
    unpack,
)

GROUPS = 16


def decode_q2_k(blocks: Tensor) -> Tensor:
    """Decode code * scale - minimum: uint8 [..., 84] to float32 [..., 256].

    The low nibbles of the first 16 bytes are the scales, in units of the block's scale, and the
    high nibbles are the minima, in units of its minimum.
    """
    groups, codes, scale, minimum = fields(blocks, GROUPS, LARGE // 4, 2, 2)
    scales = (to_floats(scale) * (groups & 0xF).float()).unsqueeze(-1)
    minima = (to_floats(minimum) * (groups >> 4).float()).unsqueeze(-1)
    values = in_groups(unpack(codes, 32, PAIRS), GROUPS).float()
    return (scales * values - minima).flatten(-2)


SCHEME = block_scheme(
    "Q2_K",
    bits=2,
    group=LARGE,
    block_bytes=84,
    usual_error=0.6,
    scales_at=(80, 82),
    decode=decode_q2_k,
)
