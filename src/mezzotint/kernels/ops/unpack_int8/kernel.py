"""Unpack a tile of a 4-bit matrix to INT8."""

import triton
import triton.language as tl

MIDDLE = tl.constexpr(8)
"""Code of zero without a codebook."""
INT8_MAX = tl.constexpr(127.0)
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: float32 numbers of this size are integers, so adding it rounds to the nearest."""


@triton.jit
def _unpack_int8_kernel(
    codes_ptr,
    block_ptr,
    codebook_ptr,
    out_ptr,
    n,
    k,
    group,
    HAS_BLOCKS: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    # 64 bits, because a large matrix has more than 2^31 elements.
    row = (tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)).to(tl.int64)[:, None]
    first_column = tl.program_id(1) * TILE_K
    byte = (first_column // 2 + tl.arange(0, TILE_K // 2))[None, :]
    column = (first_column + tl.arange(0, TILE_K))[None, :]
    packed = tl.load(codes_ptr + row * (k // 2) + byte, (row < n) & (byte < k // 2), 0)
    # The low nibble is the even column: `interleave` alternates both along the last axis.
    code = tl.interleave(packed & 0xF, packed >> 4).to(tl.int32)
    mask = (row < n) & (column < k)
    if HAS_BLOCKS:
        level = tl.load(codebook_ptr + code) if HAS_CODEBOOK else (code - MIDDLE).to(tl.float32)
        scale = tl.load(block_ptr + row * (k // group) + column // group, mask, 0.0)
        scaled = level * scale.to(tl.float32)
        # Clamping between product and sum keeps the compiler from fusing them, which would round
        # once instead of twice.
        scaled = tl.minimum(tl.maximum(scaled, -INT8_MAX), INT8_MAX)
        integer = ((scaled + ROUNDER) - ROUNDER).to(tl.int8)
    else:
        # Two's complement in four bits: flip the sign bit, then subtract its value.
        integer = ((code ^ 8) - 8).to(tl.int8)
    tl.store(out_ptr + row * k + column, integer, mask)
