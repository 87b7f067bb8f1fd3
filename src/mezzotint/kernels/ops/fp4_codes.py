"""Decode 4-bit codes and encode e4m3 inside Triton kernels.

The kind of the codes is a compile-time constant: E2M1, SIGNED or UNSIGNED, as in `code_kinds`.
"""

import triton
import triton.language as tl

CODE_SCALE = (16384.0, 1.0, 1.0)
"""Factor of decoded values by kind: E2M1, signed, unsigned. See `decode_low_nibble`."""

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def decode_low_nibble(packed, KIND: tl.constexpr):
    """Decode the low nibbles of bytes (int32) to float32, in units of `CODE_SCALE`.

    An E2M1 code is shifted into the sign, exponent and mantissa bits of a float16. The exponent
    bias there is 15 instead of 1, so the result is too small by 2^14. Subnormals decode correctly.
    The caller multiplies by 2^14 together with another scale. Formats: OCP MX v1.0, section 5.3.
    """
    if KIND == 0:
        return (
            (((packed & 7) << 9) | ((packed & 8) << 12))
            .to(tl.int16)
            .to(tl.float16, bitcast=True)
            .to(tl.float32)
        )
    if KIND == 1:
        # Two's complement in four bits: flip the sign bit, then subtract its value.
        return (((packed & 0xF) ^ 8) - 8).to(tl.float32)
    return (packed & 0xF).to(tl.float32)


@triton.jit
def decode_high_nibble(packed, KIND: tl.constexpr):
    """Decode the high nibbles of bytes (int32) to float32, in units of `CODE_SCALE`."""
    if KIND == 0:
        bits = ((packed & 0x70) << 5) | ((packed & 0x80) << 8)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if KIND == 1:
        return ((packed >> 4) ^ 8).to(tl.float32) - 8.0
    return (packed >> 4).to(tl.float32)


@triton.jit
def to_e4m3(x):
    """Convert float32 to the nearest e4m3 number, saturating at 448."""
    # Clamp first: e4m3 has no infinity, and a plain conversion of larger numbers gives NaN.
    return tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX).to(tl.float8e4nv)
