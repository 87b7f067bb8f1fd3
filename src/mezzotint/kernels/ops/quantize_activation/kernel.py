"""Activation functions and FP8 quantization: one pass over memory instead of three."""

import triton
import triton.language as tl

from mezzotint.kernels.ops.fp4_codes import E4M3_MAX, to_e4m3

TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
MAX_EXPONENT = tl.constexpr(80.0)
"""exp(80) is finite in float32, and a number divided by it is 0 in FP8."""


@triton.jit
def _quantize_into_kernel(
    x_ptr, inverse_scale_ptr, out_ptr, columns, x_row, out_row, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < columns
    x = tl.load(x_ptr + row * x_row + column, mask, 0.0).to(tl.float32) * tl.load(inverse_scale_ptr)
    tl.store(out_ptr + row * out_row + column, to_e4m3(x), mask)


@triton.jit
def _activation_quantize_kernel(
    x_ptr,
    prefix_ptr,
    out_ptr,
    scale_ptr,
    columns,
    prefix_columns,
    x_row,
    prefix_row,
    GATED: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    COLUMNS: tl.constexpr,
    PREFIX: tl.constexpr,
):
    # A program holds a whole row in registers, because the scale of the row needs its maximum.
    row = tl.program_id(0).to(tl.int64)
    column, prefix_column = tl.arange(0, COLUMNS), tl.arange(0, PREFIX)
    x_ptr += row * x_row
    x = tl.load(x_ptr + column, column < columns, 0.0).to(tl.float32)
    if GATED:
        up = tl.load(x_ptr + columns + column, column < columns, 0.0).to(tl.float32)
        # Keep the row in x's dtype until the maximum is known: half the registers.
        x = (_times_sigmoid(x, x) * up).to(x_ptr.dtype.element_ty)
        x = x.to(tl.float32)
    else:
        # GELU by tanh: 0.5 * (1 + tanh(y)) equals sigmoid(2 * y).
        x = _times_sigmoid(x, x * (1 + 0.044715 * x * x) * TWICE_SQRT_2_OVER_PI)
    amax = tl.max(tl.abs(x), 0)
    if HAS_PREFIX:
        prefix = tl.load(
            prefix_ptr + row * prefix_row + prefix_column, prefix_column < prefix_columns, 0.0
        ).to(tl.float32)
        amax = tl.maximum(amax, tl.max(tl.abs(prefix), 0))
    # A row of zeros stays zero with any scale, and 0 / 0 would be NaN.
    scale = tl.where(amax > 0, amax / E4M3_MAX, 1.0)
    tl.store(scale_ptr + row, scale)
    out_row = out_ptr + row * (prefix_columns + columns)
    tl.store(out_row + prefix_columns + column, to_e4m3(x / scale), column < columns)
    if HAS_PREFIX:
        tl.store(out_row + prefix_column, to_e4m3(prefix / scale), prefix_column < prefix_columns)


@triton.jit
def _times_sigmoid(x, y):
    # Without the minimum, exp overflows to infinity for very negative y.
    return x / (1 + tl.exp(tl.minimum(-y, MAX_EXPONENT)))
