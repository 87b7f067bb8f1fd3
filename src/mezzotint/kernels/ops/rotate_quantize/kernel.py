"""Rotate groups of columns by a Hadamard matrix on tensor cores, and quantize them to INT8."""

import triton
import triton.language as tl

INT8_MAX = tl.constexpr(127.0)
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: float32 numbers of this size are integers, so adding it rounds to the nearest."""


@triton.jit
def _rotate_quantize_kernel(
    x_ptr,
    signs_ptr,
    input_scale_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    columns,
    x_row,
    NORM: tl.constexpr,
    STATIC: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_M: tl.constexpr,
):
    # A program takes whole rows, because the scale of a row needs its maximum. The second pass
    # rotates again: x comes from the L2 cache then, and keeping the rotated rows needs too many
    # registers.
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    index = tl.arange(0, GROUP)
    mask = row[:, None] < rows
    x_ptr += row[:, None] * x_row + index[None, :]
    codes_ptr += row[:, None] * columns + index[None, :]
    # +1 and -1 are exact in every dtype, so the products are too.
    signs = tl.load(signs_ptr + index[:, None] * GROUP + index[None, :])
    signs = signs.to(x_ptr.dtype.element_ty)
    if STATIC:
        scale = tl.zeros((TILE_M,), tl.float32) + tl.load(input_scale_ptr)
    else:
        amax = tl.zeros((TILE_M,), tl.float32)
        total = tl.zeros((TILE_M,), tl.float32)
        for start in range(0, columns, GROUP):
            rotated = _rotate(tl.load(x_ptr + start, mask, 0.0), signs, NORM)
            amax = tl.maximum(amax, tl.max(tl.abs(rotated), 1))
            total += tl.sum(rotated, 1)
        # A row of zeros stays zero with any scale, and 0 / 0 would be NaN. Integers have no NaN,
        # and maxima ignore it, so a row with NaN or infinity gets a scale of NaN by its sum.
        scale = tl.where(amax > 0, amax / INT8_MAX, 1.0) + total * 0.0
        tl.store(scale_ptr + row, scale, row < rows)
    for start in range(0, columns, GROUP):
        rotated = _rotate(tl.load(x_ptr + start, mask, 0.0), signs, NORM)
        tl.store(codes_ptr + start, to_int8(rotated / scale[:, None]), mask)


@triton.jit
def _rotate(x, signs, NORM: tl.constexpr):
    return tl.dot(x, signs, out_dtype=tl.float32, input_precision="ieee") * NORM


@triton.jit
def to_int8(x):
    """Convert float32 to the nearest integer of [-128, 127], ties to even."""
    x = tl.minimum(tl.maximum(x, -INT8_MAX - 1.0), INT8_MAX)
    return ((x + ROUNDER) - ROUNDER).to(tl.int8)
