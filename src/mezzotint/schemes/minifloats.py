"""The small float formats, and how real numbers are rounded to them."""

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
"""Value of each 4-bit code: sign in bit 3, two exponent bits, one mantissa bit. Source: OCP MX v1.0, table 4."""


def unpack_nibbles(codes: Tensor) -> Tensor:
    """The two 4-bit codes of each byte: uint8 [..., n/2], low nibble first, to uint8 [..., n] of 0..15."""
    return torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)


def unpack_e2m1(codes: Tensor) -> Tensor:
    """Values of packed 4-bit floats: uint8 [..., n/2], low nibble first, to float32 [..., n]."""
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)
    return F.embedding(codes.int(), pairs).flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes 0..15 a byte, the even one in the low nibble: uint8 [..., n] to uint8 [..., n/2]."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def pack_e2m1(values: Tensor) -> Tensor:
    """The packed codes of values that are E2M1 already: float32 [..., n] to uint8 [..., n/2], low nibble first."""
    doubled = (values.abs() * 2).to(torch.uint8)
    code_of = torch.tensor(
        [0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=torch.uint8, device=values.device
    )
    return pack_nibbles(
        F.embedding(doubled.int(), code_of[:, None]).squeeze(-1) | torch.signbit(values).byte() << 3
    )


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest E2M1 value, ties to the even mantissa, magnitudes above 6 saturate; float32 in and out.

    The grid is 0.5 apart up to 2, then 1, then 2; `torch.round` is ties-to-even on each of the three, and the even
    multiple of a step is the value whose mantissa bit is 0.
    """
    magnitude = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


def round_e4m3(x: Tensor) -> Tensor:
    """Nearest float8_e4m3fn, saturating at ±448; float32 in, float8_e4m3fn out."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
