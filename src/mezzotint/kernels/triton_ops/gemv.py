"""torch.ops.mezzotint.gemv4: a quantized matrix times a few vectors, read and decoded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mezzotint.kernels.triton_ops.codes import UNIT, high_of, low_of

ROWS, COLUMNS = 8, 1024


@triton.jit
def _gemv4(
    x_ptr,
    codes_ptr,
    block_ptr,
    zero_ptr,
    factor_ptr,
    out_ptr,
    rows,
    columns,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    vector = tl.arange(0, WIDTH)
    groups = (columns + GROUP - 1) // GROUP
    place = row[:, None].to(tl.int64)
    in_rows = row[:, None] < rows
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, columns, COLUMNS):
        byte = first // 2 + tl.arange(0, COLUMNS // 2)
        group = first // GROUP + tl.arange(0, COLUMNS // GROUP)
        inside = byte < columns // 2
        packed = tl.load(codes_ptr + place * (columns // 2) + byte[None, :], in_rows & inside[None, :], 0).to(tl.int32)
        low, high = low_of(packed, KIND), high_of(packed, KIND)
        at = place * groups + group[None, :]
        there = in_rows & (group < groups)[None, :]
        block = tl.load(block_ptr + at, there, 0.0).to(tl.float32) * UNIT
        for one in tl.static_range(VECTORS):
            even = tl.load(x_ptr + one * columns + 2 * byte, inside, 0.0).to(tl.float32)
            odd = tl.load(x_ptr + one * columns + 2 * byte + 1, inside, 0.0).to(tl.float32)
            products = low * even[None, :] + high * odd[None, :]
            own = tl.sum(tl.sum(products.reshape(ROWS, COLUMNS // GROUP, GROUP // 2), 2) * block, 1)
            if HAS_ZERO:
                plain = tl.sum((even + odd).reshape(COLUMNS // GROUP, GROUP // 2), 1)
                own += tl.sum(tl.load(zero_ptr + at, there, 0.0).to(tl.float32) * plain[None, :], 1)
            total += tl.where(vector[None, :] == one, own[:, None], 0.0)
    factor = tl.load(factor_ptr + row, row < rows, 0.0)
    out = out_ptr + vector[None, :] * rows + row[:, None]
    tl.store(out, total * factor[:, None], in_rows & (vector < VECTORS)[None, :])


@triton_op("mezzotint::gemv4", mutates_args={})
def gemv4(
    x: Tensor, codes: Tensor, block_scale: Tensor, block_zero: Tensor | None, factor: Tensor, kind: int, group: int
) -> Tensor:
    """x [vectors, in] times a 4-bit matrix's (code * block_scale + block_zero) * factor; float32 [vectors, out].

    codes         uint8 [out, in/2]
    block_scale   e4m3 or bf16 [out, in/group]; block_zero likewise or None
    factor        float32 [out]
    """
    rows, columns = codes.shape[0], codes.shape[1] * 2
    vectors = x.shape[0]
    out = torch.empty(vectors, rows, dtype=torch.float32, device=x.device)
    wrap_triton(_gemv4)[(triton.cdiv(rows, ROWS),)](
        x,
        codes,
        block_scale,
        block_scale if block_zero is None else block_zero,
        factor,
        out,
        rows,
        columns,
        KIND=kind,
        UNIT=UNIT[kind],
        GROUP=group,
        HAS_ZERO=block_zero is not None,
        VECTORS=vectors,
        WIDTH=triton.next_power_of_2(vectors),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return out
