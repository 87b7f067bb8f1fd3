"""Nunchaku's fragment orders, in which its GPU threads hold a matrix, and AWQ's packing.

All functions permute whole fragments: rows (N) and columns (K) are multiples of 128 (AWQ: 4 and
64), and ranks are multiples of 16. A thread then finds its operands in adjacent bytes.

Sources: NunchakuWeightPacker of https://github.com/nunchaku-tech/deepcompressor and pack_w4 of
https://github.com/mit-han-lab/llm-awq (tinychat). tests/data/layouts has bytes that both wrote.
"""

import torch
from torch import Tensor

WARP = 128
"""Rows per warp; both dimensions of a matrix are padded to multiples of this."""
TILE_K = 64
RANKS = 16
AWQ_ROWS, AWQ_COLUMNS, AWQ_GROUPS = 4, 64, 16


def to_code_fragments(codes: Tensor) -> Tensor:
    """Convert 4-bit codes, uint8 [N, K/2] low nibble first, to int8 [N, K/2] in fragment order.

    Row n = 128 nt + 16 np + 8 n1 + nl, column k = 64 kt + 32 k1 + 8 kl + r. Eight adjacent columns
    stay one 32-bit word, so the permutation moves whole bytes.
    """
    rows, half = codes.shape
    # Axes: nt np n1 nl kt k1 kl byte. The 32 lanes of a warp are 8 nl x 4 kl, as the instruction
    # mma.m16n8k64 wants its operand B. A lane's four words (n1, k1) become adjacent, so that it
    # loads them as 16 bytes. Fragments: https://docs.nvidia.com/cuda/parallel-thread-execution/
    words = codes.view(rows // WARP, 8, 2, 8, half * 2 // TILE_K, 2, 4, 4)
    return words.permute(0, 4, 1, 3, 6, 2, 5, 7).reshape(rows, half).view(torch.int8)


def from_code_fragments(packed: Tensor) -> Tensor:
    """Inverse of `to_code_fragments`."""
    rows, half = packed.shape
    # Axes: nt kt np nl kl n1 k1 byte.
    words = packed.view(torch.uint8).view(rows // WARP, half * 2 // TILE_K, 8, 8, 4, 2, 2, 4)
    return words.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(rows, half)


def to_vector_fragments(values: Tensor) -> Tensor:
    """Convert 16-bit numbers [N, G], one per row and group, to [G, N] in fragment order.

    The stored shape is nominal: memory runs over [N/128][G][128]. Each run of 16 rows is in the
    order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15.
    """
    rows, groups = values.shape
    # The accumulators of mma give each lane two adjacent output features of every eight. With two
    # such eights together, a lane loads its four numbers (axes 2 and 4) as 8 bytes.
    return (
        values.view(rows // WARP, 8, 2, 4, 2, groups)
        .permute(0, 5, 1, 3, 2, 4)
        .reshape(groups, rows)
    )


def from_vector_fragments(packed: Tensor) -> Tensor:
    """Inverse of `to_vector_fragments`: [G, N] to [N, G]."""
    groups, rows = packed.shape
    return (
        packed.reshape(rows // WARP, groups, 8, 4, 2, 2)
        .permute(0, 2, 4, 3, 5, 1)
        .reshape(rows, groups)
    )


def to_micro_fragments(scales: Tensor) -> Tensor:
    """Convert 8-bit scales [N, K/16] to [K/16, N] in fragment order.

    Memory is [N/128][K/64][8 l][4 q][4 p][4 j], where the row is 32 p + 8 q + l.
    """
    rows, groups = scales.shape
    # The block-scaled mma reads the four scales (j) of a row's 64 columns as one 32-bit word. Each
    # lane has four such words (p), loaded as 16 bytes.
    return (
        scales.view(rows // WARP, 4, 4, 8, groups // 4, 4)
        .permute(0, 4, 3, 2, 1, 5)
        .reshape(groups, rows)
    )


def from_micro_fragments(packed: Tensor) -> Tensor:
    """Inverse of `to_micro_fragments`: [K/16, N] to [N, K/16]."""
    groups, rows = packed.shape
    tiles = packed.reshape(rows // WARP, groups // 4, 8, 4, 4, 4)
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups)


def to_up_fragments(up: Tensor) -> Tensor:
    """Convert proj_up [N, R] to 16 x 16 fragments of the same shape."""
    rows, ranks = up.shape
    # Lanes are 8 rows x 4 pairs of ranks, as in `to_code_fragments`. BF16 numbers are four times as
    # wide as codes, so the tile of 16 bytes per lane is 16 x 16.
    return (
        up.view(rows // 16, 2, 8, ranks // 16, 2, 4, 2)
        .permute(0, 3, 2, 5, 1, 4, 6)
        .reshape(rows, ranks)
    )


def from_up_fragments(packed: Tensor) -> Tensor:
    """Inverse of `to_up_fragments`."""
    rows, ranks = packed.shape
    return (
        packed.view(rows // 16, ranks // 16, 8, 4, 2, 2, 2)
        .permute(0, 4, 2, 1, 5, 3, 6)
        .reshape(rows, ranks)
    )


def to_down_fragments(down: Tensor) -> Tensor:
    """Convert proj_down [R, K] to [K, R] in 16 x 16 fragments, whose rows are ranks."""
    ranks, columns = down.shape
    # Ranks are the output features of this GEMM, so they take the place of the rows in proj_up.
    return (
        down.view(ranks // 16, 2, 8, columns // 16, 2, 4, 2)
        .permute(3, 0, 2, 5, 1, 4, 6)
        .reshape(columns, ranks)
    )


def from_down_fragments(packed: Tensor) -> Tensor:
    """Inverse of `to_down_fragments`: [K, R] to [R, K]."""
    columns, ranks = packed.shape
    tiles = packed.view(columns // 16, ranks // 16, 8, 4, 2, 2, 2)
    return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(ranks, columns)


def to_awq_words(codes: Tensor) -> Tensor:
    """Convert 4-bit codes, uint8 [N, K/2] low nibble first, to AWQ's int32 [N/4, K/2].

    The 16-bit unit (n//4, k//64, n%4, (k%64)//32, k%8) holds columns k, k+8, k+16 and k+24, the
    first in its lowest nibble.
    """
    rows, half = codes.shape
    nibbles = torch.stack((codes & 0xF, codes >> 4), dim=-1).view(
        rows // 4, 4, half * 2 // 64, 2, 4, 8
    )
    # Axes after it: row block, column block, row, half, k % 8, nibble.
    nibbles = nibbles.permute(0, 2, 1, 3, 5, 4).reshape(-1, 2)
    return (nibbles[:, 0] | nibbles[:, 1] << 4).view(torch.int32).view(rows // 4, half)


def from_awq_words(words: Tensor) -> Tensor:
    """Inverse of `to_awq_words`: int32 [N/4, K/2] to uint8 [N, K/2]."""
    blocks, half = words.shape
    packed = words.contiguous().view(torch.uint8)
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).view(
        blocks, half * 2 // 64, 4, 2, 8, 4
    )
    nibbles = nibbles.permute(0, 2, 1, 3, 5, 4).reshape(-1, 2)
    return (nibbles[:, 0] | nibbles[:, 1] << 4).view(blocks * 4, half)
