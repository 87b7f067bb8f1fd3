"""GGUF IQ4_NL: blocks of 32 codes of 4 bits for uneven values, with a float16 scale."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.schemes.gguf_blocks import NIBBLES, SMALL, block_scheme, fields, to_floats, unpack

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The value of each code.

Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, kvalues_iq4nl
"""


def look_up(codes: Tensor) -> Tensor:
    """Return the values of codes 0 to 15: float32 of the same shape."""
    values = torch.tensor(VALUES, dtype=torch.float32, device=codes.device)
    return F.embedding(codes.int(), values[:, None]).squeeze(-1)


def decode_iq4_nl(blocks: Tensor) -> Tensor:
    """Decode value * scale: uint8 [..., 18] to float32 [..., 32]."""
    scale, codes = fields(blocks, 2, SMALL // 2)
    return to_floats(scale) * look_up(unpack(codes, SMALL // 2, NIBBLES))


SCHEME = block_scheme(
    "IQ4_NL",
    bits=4,
    group=SMALL,
    block_bytes=18,
    usual_error=0.2,
    scales_at=(0,),
    decode=decode_iq4_nl,
)
