"""The 4-bit and 8-bit float formats: rounding, packing and unpacking."""

import torch
from torch import Tensor
from torch.nn import functional as F

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E2M1_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
"""Value of each 4-bit code: sign in bit 3, two exponent bits, one mantissa bit.

Source: OCP Microscaling Formats v1.0, table 4
"""


def unpack_nibbles(codes: Tensor) -> Tensor:
    """Unpack uint8 [..., n/2], low nibble first, to codes 0..15: uint8 [..., n]."""
    return torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)


def unpack_e2m1(codes: Tensor) -> Tensor:
    """Decode packed E2M1 codes: uint8 [..., n/2], low nibble first, to float32 [..., n]."""
    # A table of all 256 bytes, each with its two values, takes one lookup per byte.
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)
    return F.embedding(codes.int(), pairs).flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes 0..15, uint8 [..., n], to uint8 [..., n/2]; the even column is the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def pack_e2m1(values: Tensor) -> Tensor:
    """Encode E2M1 values, float32 [..., n], to packed codes: uint8 [..., n/2], low nibble first.

    The values must be exact E2M1 values; see `round_e2m1`.
    """
    # Twice a magnitude is an integer up to 12, which indexes the codes.
    doubled = (values.abs() * 2).to(torch.uint8)
    code_of = torch.tensor(
        [0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=torch.uint8, device=values.device
    )
    return pack_nibbles(
        F.embedding(doubled.int(), code_of[:, None]).squeeze(-1) | torch.signbit(values).byte() << 3
    )


def round_e2m1(x: Tensor) -> Tensor:
    """Round float32 values to E2M1, ties to the even mantissa; magnitudes above 6 saturate."""
    # The spacing is 0.5 up to 2, then 1, then 2. `torch.round` rounds ties to even multiples of
    # the spacing, whose mantissa bit is 0.
    magnitude = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


def round_e4m3(x: Tensor) -> Tensor:
    """Round float32 values to float8_e4m3fn; magnitudes above 448 saturate."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
