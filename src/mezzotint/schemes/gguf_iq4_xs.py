"""GGUF IQ4_XS: blocks of 256 codes as in IQ4_NL; 8 groups with a signed scale of 6 bits."""

from torch import Tensor

from mezzotint.schemes.gguf_blocks import (
    LARGE,
    NIBBLES,
    PAIRS,
    block_scheme,
    fields,
    in_groups,
    signed,
    to_floats,
    unpack,
)
from mezzotint.schemes.gguf_iq4_nl import look_up

GROUPS, SCALE_OFFSET = 8, 32


def decode_iq4_xs(blocks: Tensor) -> Tensor:
    """Decode value * scale: uint8 [..., 136] to float32 [..., 256].

    The eight scales are four bytes of low nibbles and two bytes of two high bits each, minus 32,
    in units of the block's scale.
    """
    scale, high, low, codes = fields(blocks, 2, 2, 4, LARGE // 2)
    scales = unpack(low, 1, NIBBLES) | unpack(high, 1, PAIRS) << 4
    units = (to_floats(scale) * signed(scales, SCALE_OFFSET)).unsqueeze(-1)
    values = in_groups(look_up(unpack(codes, 16, NIBBLES)), GROUPS)
    return (units * values).flatten(-2)


SCHEME = block_scheme(
    "IQ4_XS",
    bits=4,
    group=LARGE,
    block_bytes=136,
    usual_error=0.2,
    scales_at=(0,),
    decode=decode_iq4_xs,
)
