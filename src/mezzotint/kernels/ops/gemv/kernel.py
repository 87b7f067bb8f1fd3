"""Multiply a 4-bit matrix by a few vectors, reading and decoding it once."""

import triton
import triton.language as tl

from mezzotint.kernels.ops.fp4_codes import decode_high_nibble, decode_low_nibble


@triton.jit
def _gemv4_kernel(
    x_ptr,
    codes_ptr,
    block_ptr,
    zero_ptr,
    factor_ptr,
    out_ptr,
    n,
    k,
    KIND: tl.constexpr,
    CODE_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    M: tl.constexpr,
    PADDED_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    vector = tl.arange(0, PADDED_M)
    num_groups = (k + GROUP - 1) // GROUP
    row_offset = row[:, None].to(tl.int64)
    row_mask = row[:, None] < n
    total = tl.zeros((TILE_N, PADDED_M), tl.float32)
    for first_column in range(0, k, TILE_K):
        byte = first_column // 2 + tl.arange(0, TILE_K // 2)
        group = first_column // GROUP + tl.arange(0, TILE_K // GROUP)
        byte_mask = byte < k // 2
        packed = tl.load(
            codes_ptr + row_offset * (k // 2) + byte[None, :], row_mask & byte_mask[None, :], 0
        ).to(tl.int32)
        low, high = decode_low_nibble(packed, KIND), decode_high_nibble(packed, KIND)
        group_offset = row_offset * num_groups + group[None, :]
        group_mask = row_mask & (group < num_groups)[None, :]
        block = tl.load(block_ptr + group_offset, group_mask, 0.0).to(tl.float32) * CODE_SCALE
        # The codes stay in registers while every vector passes over them. Even and odd columns
        # are separate, as the nibbles are: interleaving the codes would cost a shuffle each.
        for vector_id in tl.static_range(M):
            even = tl.load(x_ptr + vector_id * k + 2 * byte, byte_mask, 0.0).to(tl.float32)
            odd = tl.load(x_ptr + vector_id * k + 2 * byte + 1, byte_mask, 0.0).to(tl.float32)
            partial_sum = _dot(low, high, even, odd, block, TILE_N, TILE_K // GROUP, GROUP // 2)
            if HAS_ZERO:
                # A group's zero point multiplies the sum of its inputs.
                input_sum = tl.sum((even + odd).reshape(TILE_K // GROUP, GROUP // 2), 1)
                zero = tl.load(zero_ptr + group_offset, group_mask, 0.0).to(tl.float32)
                partial_sum += tl.sum(zero * input_sum[None, :], 1)
            total += tl.where(vector[None, :] == vector_id, partial_sum[:, None], 0.0)
    factor = tl.load(factor_ptr + row, row < n, 0.0)
    out = out_ptr + vector[None, :] * n + row[:, None]
    tl.store(out, total * factor[:, None], row_mask & (vector < M)[None, :])


@triton.jit
def _dot(
    low, high, even, odd, block, ROWS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr
):
    """Return the product of a tile and a part of one vector, float32 [ROWS]."""
    products = low * even[None, :] + high * odd[None, :]
    # Sum each group first: the block scale then multiplies one number per group.
    group_sums = tl.sum(products.reshape(ROWS, GROUPS, BYTES), 2)
    return tl.sum(group_sums * block, 1)
