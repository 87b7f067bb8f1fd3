"""Constants of kernel.cu that Python needs, and the source of each variant."""

from pathlib import Path

from mezzotint.kernels.ops.fp8_gemm_act.reference import FUSED_ACTIVATIONS

NAME = "fp8_gemm_act"
ARCHITECTURE = "sm_90a"
"""The "a" enables wgmma and setmaxnreg, which later architectures do not have."""
CLUSTER_SIZE, TILE_M, TILE_N, TILE_K = 2, 128, 256, 128
"""Blocks per cluster, and the tile of a block, as in kernel.cu."""
MMA_THREADS, LOAD_THREADS = 256, 128
THREADS = MMA_THREADS + LOAD_THREADS
SHARED_BYTES = 1024 + 4 * (TILE_M + TILE_N) * TILE_K + 4 * 64 * 128 + 8 * 8
"""Alignment, four stages, four output tiles and eight barriers."""


def kernel_source(activation: str, x_by_row: bool, codes_by_row: bool, biased: bool) -> str:
    """Return the CUDA source of one variant.

    wgmma takes its 128 accumulators as operands of one assembly statement. kernel.cu has
    placeholders for these lists.
    """
    accumulators = range(TILE_M * TILE_N // MMA_THREADS)
    source = Path(__file__).with_name("kernel.cu").read_text()
    source = source.replace("@OPERANDS@", ", ".join(f"%{i}" for i in accumulators))
    source = source.replace("@ACCUMULATORS@", ", ".join(f'"+f"(acc[{i}])' for i in accumulators))
    definitions = {
        "ACTIVATION": FUSED_ACTIVATIONS.index(activation),
        "X_BY_ROW": int(x_by_row),
        "CODES_BY_ROW": int(codes_by_row),
        "BIAS": int(biased),
    }
    return "".join(f"#define {name} {value}\n" for name, value in definitions.items()) + source
