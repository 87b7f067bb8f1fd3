"""torch.ops.mezzotint.expand: a 4-bit matrix written out as FP8, row by row, for a product that follows at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mezzotint.kernels.triton_ops.codes import UNIT, high_of, low_of, to_e4m3

ROWS, COLUMNS, WARPS = 16, 256, 4
"""Of one program. The fastest of thirteen on an H100, with a low-rank branch and without."""


@triton.jit
def _expand(
    codes_ptr,
    block_ptr,
    factor_ptr,
    scale_ptr,
    column_ptr,
    up_ptr,
    down_ptr,
    out_ptr,
    rows,
    columns,
    rank,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    byte = first // 2 + tl.arange(0, COLUMNS // 2)
    column = first + tl.arange(0, COLUMNS)
    group = first // GROUP + tl.arange(0, COLUMNS // GROUP)
    groups = (columns + GROUP - 1) // GROUP
    in_rows = row[:, None] < rows

    place = row[:, None].to(tl.int64)
    packed = tl.load(codes_ptr + place * (columns // 2) + byte[None, :], in_rows & (byte < columns // 2)[None, :], 0)
    packed = packed.to(tl.int32)
    values = tl.join(low_of(packed, KIND), high_of(packed, KIND))
    blocks = tl.load(block_ptr + place * groups + group[None, :], in_rows & (group < groups)[None, :], 0.0)
    factor = tl.load(factor_ptr + row, row < rows, 0.0) * UNIT
    values = values.reshape(ROWS, COLUMNS // GROUP, GROUP) * blocks.to(tl.float32)[:, :, None]
    values = values.reshape(ROWS, COLUMNS) * factor[:, None]

    if HAS_LOW_RANK:
        r = tl.arange(0, RANK)
        up = tl.load(up_ptr + place * rank + r[None, :], in_rows & (r < rank)[None, :], 0.0)
        inside = (r < rank)[:, None] & (column < columns)[None, :]
        down = tl.load(down_ptr + r[:, None] * columns + column[None, :], inside, 0.0)
        scale = tl.load(scale_ptr + row, row < rows, 1.0)
        # rounded, because half the bytes then move between the layouts of a product and of the codes
        low_rank = (tl.dot(up, down, out_dtype=tl.float32) / scale[:, None]).to(tl.bfloat16)
        if BY_COLUMN:
            values += low_rank.to(tl.float32)
    if HAS_COLUMN:
        values *= tl.load(column_ptr + column, column < columns, 0.0)[None, :]
    if HAS_LOW_RANK and not BY_COLUMN:
        values += low_rank.to(tl.float32)
    tl.store(out_ptr + place * columns + column[None, :], to_e4m3(values), in_rows & (column < columns)[None, :])


@triton_op("mezzotint::expand", mutates_args={})
def expand(
    codes: Tensor,
    block_scale: Tensor,
    factor: Tensor,
    scale: Tensor,
    column: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    kind: int,
    group: int,
    by_column: bool,
) -> Tensor:
    """See `mezzotint.kernels.expand.expand_by_definition`, which says what is computed; e4m3 [out, in]."""
    rows, columns = codes.shape[0], codes.shape[1] * 2
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=codes.device)
    rank = 0 if down is None else down.shape[0]
    wrap_triton(_expand)[triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)](
        codes,
        block_scale,
        factor,
        scale,
        factor if column is None else column,
        codes if up is None else up,
        codes if down is None else down,
        out,
        rows,
        columns,
        rank,
        KIND=kind,
        UNIT=UNIT[kind],
        GROUP=group,
        HAS_COLUMN=column is not None,
        HAS_LOW_RANK=down is not None,
        BY_COLUMN=by_column,
        RANK=max(16, triton.next_power_of_2(max(rank, 1))),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return out
