"""A matrix rounded to FP8 into the first columns of a wider one."""

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024


@triton.jit
def _round_into(x_ptr, inverse_ptr, out_ptr, columns, x_row, out_row, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    x = tl.load(x_ptr + row * x_row + column, inside, 0.0).to(tl.float32) * tl.load(inverse_ptr)
    rounded = tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)
    tl.store(out_ptr + row * out_row + column, rounded, inside)


def round_into(x: Tensor, inverse: Tensor, out: Tensor) -> None:
    """out[:, :columns] = e4m3(x * inverse), x [rows, columns], inverse float32 of one number, out [rows, wider] e4m3"""
    rows, columns = x.shape
    grid = (rows, triton.cdiv(columns, COLUMNS))
    _round_into[grid](x, inverse, out, columns, x.stride(0), out.stride(0), COLUMNS=COLUMNS, num_warps=4)
