"""How 4-bit codes become numbers inside a kernel, and numbers e4m3. A kind is a compile-time constant of kernels."""

import triton
import triton.language as tl

UNIT = (16384.0, 1.0, 1.0)
"""By kind: E2M1, signed, unsigned."""

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def low_of(packed, KIND: tl.constexpr):
    """float32 value of the low nibbles of bytes (int32), in units of `UNIT`.

    An E2M1 code is a float16 with its sign, two exponent bits and one mantissa bit in place, times 2 to the 14th:
    the exponent's bias is 15 there and 1 here, and subnormals come out right by themselves. The factor is left to
    whoever scales the result.
    """
    if KIND == 0:
        return (((packed & 7) << 9) | ((packed & 8) << 12)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if KIND == 1:
        return (((packed & 0xF) ^ 8) - 8).to(tl.float32)
    return (packed & 0xF).to(tl.float32)


@triton.jit
def high_of(packed, KIND: tl.constexpr):
    """The same of the high nibbles."""
    if KIND == 0:
        bits = ((packed & 0x70) << 5) | ((packed & 0x80) << 8)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if KIND == 1:
        return ((packed >> 4) ^ 8).to(tl.float32) - 8.0
    return (packed >> 4).to(tl.float32)


@triton.jit
def to_e4m3(x):
    """float32 x as the nearest e4m3 number; beyond the largest one, that one."""
    return tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX).to(tl.float8e4nv)
