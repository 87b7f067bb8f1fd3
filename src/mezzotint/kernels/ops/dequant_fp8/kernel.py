"""Dequantize a tile of a 4-bit matrix to FP8, with the low-rank branch added by tensor cores."""

import triton
import triton.language as tl

from mezzotint.kernels.ops.fp4_codes import decode_high_nibble, decode_low_nibble, to_e4m3


@triton.jit
def _dequant_fp8_kernel(
    codes_ptr,
    block_ptr,
    factor_ptr,
    scale_ptr,
    column_ptr,
    up_ptr,
    down_ptr,
    out_ptr,
    n,
    k,
    rank,
    KIND: tl.constexpr,
    CODE_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    LOW_RANK_BEFORE_COLUMN: tl.constexpr,
    RANK: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    first_column = tl.program_id(1) * TILE_K
    byte = first_column // 2 + tl.arange(0, TILE_K // 2)
    column = first_column + tl.arange(0, TILE_K)
    group = first_column // GROUP + tl.arange(0, TILE_K // GROUP)
    values = _dequantized_codes(
        codes_ptr, block_ptr, factor_ptr, row, byte, group, n, k,
        KIND, CODE_SCALE, GROUP, TILE_N, TILE_K,
    )  # fmt: skip
    # Nunchaku's branch reads the layer's own input, ModelOpt's the smoothed one. So the smoothing
    # of the columns applies to the second only.
    if HAS_LOW_RANK:
        low_rank = _low_rank(up_ptr, down_ptr, scale_ptr, row, column, n, k, rank, RANK)
        if LOW_RANK_BEFORE_COLUMN:
            values += low_rank.to(tl.float32)
    if HAS_COLUMN:
        values *= tl.load(column_ptr + column, column < k, 0.0)[None, :]
    if HAS_LOW_RANK and not LOW_RANK_BEFORE_COLUMN:
        values += low_rank.to(tl.float32)
    tl.store(
        out_ptr + row[:, None].to(tl.int64) * k + column[None, :],
        to_e4m3(values),
        (row[:, None] < n) & (column < k)[None, :],
    )


@triton.jit
def _dequantized_codes(
    codes_ptr,
    block_ptr,
    factor_ptr,
    row,
    byte,
    group,
    n,
    k,
    KIND: tl.constexpr,
    CODE_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Return code * block_scale * factor, float32 [TILE_N, TILE_K]."""
    num_groups = (k + GROUP - 1) // GROUP
    row_mask = row[:, None] < n
    # 64 bits, because a large matrix has more than 2^31 elements.
    row_offset = row[:, None].to(tl.int64)
    packed = tl.load(
        codes_ptr + row_offset * (k // 2) + byte[None, :], row_mask & (byte < k // 2)[None, :], 0
    ).to(tl.int32)
    # The low nibble is the even column: `join` interleaves both along a new last axis.
    values = tl.join(decode_low_nibble(packed, KIND), decode_high_nibble(packed, KIND))
    blocks = tl.load(
        block_ptr + row_offset * num_groups + group[None, :],
        row_mask & (group < num_groups)[None, :],
        0.0,
    )
    # CODE_SCALE is a power of two, so moving it from each code to the row's factor is exact.
    factor = tl.load(factor_ptr + row, row < n, 0.0) * CODE_SCALE
    values = values.reshape(TILE_N, TILE_K // GROUP, GROUP) * blocks.to(tl.float32)[:, :, None]
    return values.reshape(TILE_N, TILE_K) * factor[:, None]


@triton.jit
def _low_rank(up_ptr, down_ptr, scale_ptr, row, column, n, k, rank, RANK: tl.constexpr):
    """Return up @ down in units of each row's scale, BF16 [TILE_N, TILE_K]."""
    r = tl.arange(0, RANK)
    row_offset = row[:, None].to(tl.int64)
    row_mask = row[:, None] < n
    up = tl.load(up_ptr + row_offset * rank + r[None, :], row_mask & (r < rank)[None, :], 0.0)
    down_mask = (r < rank)[:, None] & (column < k)[None, :]
    down = tl.load(down_ptr + r[:, None] * k + column[None, :], down_mask, 0.0)
    scale = tl.load(scale_ptr + row, row < n, 1.0)
    # `dot` returns the tensor core's register layout and the codes have another one. Rounding to
    # BF16 halves the bytes that move between the two.
    return (tl.dot(up, down, out_dtype=tl.float32) / scale[:, None]).to(tl.bfloat16)
