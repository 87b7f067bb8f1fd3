"""Inputs of FP8 products: torch.ops.mezzotint.activation_round, and round_into for what has one scale."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

from mezzotint.kernels.triton_ops.codes import E4M3_MAX, to_e4m3

COLUMNS = 1024
WARPS = 16
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
LARGEST = tl.constexpr(80.0)
"""exp of it is a float32, and a number divided by it is 0 in FP8."""


@triton.jit
def _round_into(x_ptr, inverse_ptr, out_ptr, columns, x_row, out_row, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    x = tl.load(x_ptr + row * x_row + column, inside, 0.0).to(tl.float32) * tl.load(inverse_ptr)
    tl.store(out_ptr + row * out_row + column, to_e4m3(x), inside)


@custom_op("mezzotint::round_into", mutates_args={"out"}, device_types="cuda")
def round_into(x: Tensor, inverse: Tensor, out: Tensor) -> None:
    """out[:, :columns] = e4m3(x * inverse), x [rows, columns], inverse float32 of one number, out [rows, wider] e4m3"""
    rows, columns = x.shape
    grid = (rows, triton.cdiv(columns, COLUMNS))
    strides = x.stride(0), out.stride(0)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _round_into[grid](x, inverse, out, columns, *strides, COLUMNS=COLUMNS, num_warps=4)


round_into.register_fake(lambda x, inverse, out: None)


@triton.jit
def _activation_round(
    x_ptr,
    beside_ptr,
    out_ptr,
    scale_ptr,
    columns,
    before,
    x_row,
    beside_row,
    GATED: tl.constexpr,
    HAS_BESIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BEFORE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column, other = tl.arange(0, COLUMNS), tl.arange(0, BEFORE)
    x_ptr += row * x_row
    x = tl.load(x_ptr + column, column < columns, 0.0).to(tl.float32)
    if GATED:
        up = tl.load(x_ptr + columns + column, column < columns, 0.0).to(tl.float32)
        x = (_times_sigmoid(x, x) * up).to(x_ptr.dtype.element_ty)  # half the registers that a row is kept in
        x = x.to(tl.float32)
    else:
        x = _times_sigmoid(x, x * (1 + 0.044715 * x * x) * TWICE_SQRT_2_OVER_PI)
    amax = tl.max(tl.abs(x), 0)
    if HAS_BESIDE:
        beside = tl.load(beside_ptr + row * beside_row + other, other < before, 0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.max(tl.abs(beside), 0))
    scale = tl.where(amax > 0, amax / E4M3_MAX, 1.0)
    tl.store(scale_ptr + row, scale)
    out_row = out_ptr + row * (before + columns)
    tl.store(out_row + before + column, to_e4m3(x / scale), column < columns)
    if HAS_BESIDE:
        tl.store(out_row + other, to_e4m3(beside / scale), other < before)


@triton.jit
def _times_sigmoid(x, y):
    return x / (1 + tl.exp(tl.minimum(-y, LARGEST)))


@triton_op("mezzotint::activation_round", mutates_args={})
def activation_round(x: Tensor, beside: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """See `mezzotint.speed.rounded_products.activation_round_by_definition`, which says what is computed."""
    gated = activation == "swiglu"
    rows, columns = x.shape[0], x.shape[1] // (2 if gated else 1)
    before = 0 if beside is None else beside.shape[1]
    out = torch.empty(rows, before + columns, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    wrap_triton(_activation_round)[(rows,)](
        x,
        x if beside is None else beside,
        out,
        scale,
        columns,
        before,
        x.stride(0),
        0 if beside is None else beside.stride(0),
        GATED=gated,
        HAS_BESIDE=beside is not None,
        COLUMNS=triton.next_power_of_2(columns),
        BEFORE=triton.next_power_of_2(max(before, 1)),
        num_warps=WARPS,
    )
    return out, scale
