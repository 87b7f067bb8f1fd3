"""W6A8: 6-bit codes of an INT8 matrix, with a scale per group of columns and INT8 inputs.

Source: comfy-kitchen's AsymW4A8Int8Layout with 6 bits
"""

import torch
from torch import Tensor

from mezzotint.schemes.int8 import INT8_MAX, quantize_activation_int8
from mezzotint.schemes.minifloats import unpack_nibbles
from mezzotint.schemes.scheme import COMMON_PARTS, INPUT_SCALE, ROTATION, Part, Parts, Scheme
from mezzotint.schemes.w4a8 import BLOCK_SCALE, CHANNEL_SCALE, GROUPS, round_levels, scale_rows

MIDDLE = 32
"""Code of zero."""


def unpack_six_bits(codes: Tensor) -> Tensor:
    """Unpack uint8 [..., 3n/4] to codes 0..63, uint8 [..., n].

    A row begins with the low four bits of all its codes, as nibbles. Their upper two bits follow:
    column c is at bit 2 * (c % 4) of byte c / 4.
    """
    half = codes.shape[-1] // 3 * 2
    low, high = codes[..., :half], codes[..., half:]
    pairs = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
    return unpack_nibbles(low) | pairs << 4


def decode_w6a8(parts: Parts) -> Tensor:
    """Dequantize a W6A8 matrix: round((code - 32) * block_scale) * channel_scale.

    codes           uint8 [out, 3 in/4]; see `unpack_six_bits`
    block_scale     float8_e4m3fn or float32 [out, groups]
    channel_scale   float32 [out]
    Returns         float32 [out, in]
    """
    levels = unpack_six_bits(parts["codes"]).float() - MIDDLE
    return scale_rows(round_levels(levels, parts["block_scale"]), parts)


SCHEME = Scheme(
    name="w6a8",
    title="W6A8",
    bits=6,
    usual_error=0.1,
    keeps_bias=True,
    group=GROUPS[0],
    parts={
        # Columns cannot be cut off: a row's upper bits are stored after all of its lower ones.
        "codes": Part(
            (torch.uint8,),
            lambda out, in_: ((out, in_ * 3 // 4),),
            "four 6-bit codes in three bytes",
            rows=True,
        ),
        "block_scale": BLOCK_SCALE,
        "channel_scale": CHANNEL_SCALE,
    },
    optional={"input_scale": INPUT_SCALE, "rotation": ROTATION} | COMMON_PARTS,
    decode=decode_w6a8,
    input_max=INT8_MAX,
    quantize_activation=quantize_activation_int8,
    static_scale_part="input_scale",
)
