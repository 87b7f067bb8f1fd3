"""Constants of kernel.cu that Python needs, and the source of each variant."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mezzotint.kernels.ops.gemm_act.reference import FUSED_ACTIVATIONS

NAME = "gemm_act"
ARCHITECTURE = "sm_90a"
"""The "a" enables wgmma and setmaxnreg, which later architectures do not have."""
CLUSTER_SIZE, TILE_M, TILE_N, TILE_K = 2, 128, 256, 128
"""Blocks per cluster, and the tile of a block, as in kernel.cu."""
MMA_THREADS, LOAD_THREADS = 256, 128
THREADS = MMA_THREADS + LOAD_THREADS
SHARED_BYTES = 1024 + 4 * (TILE_M + TILE_N) * TILE_K + 4 * 64 * 128 + 8 * 8
"""Alignment, four stages, four output tiles and eight barriers."""


@dataclass(frozen=True)
class MultiplyInstruction:
    """How wgmma is written for one type of codes.

    types        types of the sums and of both factors
    signs        the operands that may negate the factors, which only floating point has
    constraint   the register constraint of an accumulator in an assembly statement
    Source       https://docs.nvidia.com/cuda/parallel-thread-execution/, "wgmma.mma_async"
    """

    types: str
    signs: str
    constraint: str


INSTRUCTIONS = {
    torch.float8_e4m3fn: MultiplyInstruction("f32.e4m3.e4m3", ", 1, 1", "+f"),
    torch.int8: MultiplyInstruction("s32.s8.s8", "", "+r"),
}


def kernel_source(
    dtype: torch.dtype, activation: str, x_by_row: bool, codes_by_row: bool, biased: bool
) -> str:
    """Return the CUDA source of one variant.

    wgmma takes its 128 accumulators as operands of one assembly statement. kernel.cu has
    placeholders for these lists, and for what depends on the type of the codes.

    dtype   of x and of the codes, a key of INSTRUCTIONS
    """
    accumulators = range(TILE_M * TILE_N // MMA_THREADS)
    instruction = INSTRUCTIONS[dtype]
    source = Path(__file__).with_name("kernel.cu").read_text()
    for placeholder, text in {
        "@TYPES@": instruction.types,
        "@SIGNS@": instruction.signs,
        "@OPERANDS@": ", ".join(f"%{i}" for i in accumulators),
        "@ACCUMULATORS@": ", ".join(f'"{instruction.constraint}"(acc[{i}])' for i in accumulators),
    }.items():
        source = source.replace(placeholder, text)
    definitions = {
        "INT8": int(dtype == torch.int8),
        "ACTIVATION": FUSED_ACTIVATIONS.index(activation),
        "X_BY_ROW": int(x_by_row),
        "CODES_BY_ROW": int(codes_by_row),
        "BIAS": int(biased),
    }
    return "".join(f"#define {name} {value}\n" for name, value in definitions.items()) + source
