"""The tensor types of GGUF: ordinary numbers, and blocks of numbers with shared scales.

Source: https://github.com/ggml-org/ggml/blob/master/include/ggml.h (enum ggml_type) and
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (the structures of the blocks)
"""

import torch

from mezzotint.containers.container import BlockType, DType

SMALL, LARGE = 32, 256
"""Elements of the blocks of the older types, and of the K types and most IQ types."""
NUMBERS: dict[int, DType] = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
BLOCKS: dict[int, BlockType] = {
    2: BlockType("Q4_0", SMALL, 18),
    3: BlockType("Q4_1", SMALL, 20),
    6: BlockType("Q5_0", SMALL, 22),
    7: BlockType("Q5_1", SMALL, 24),
    8: BlockType("Q8_0", SMALL, 34),
    9: BlockType("Q8_1", SMALL, 36),
    10: BlockType("Q2_K", LARGE, 84),
    11: BlockType("Q3_K", LARGE, 110),
    12: BlockType("Q4_K", LARGE, 144),
    13: BlockType("Q5_K", LARGE, 176),
    14: BlockType("Q6_K", LARGE, 210),
    15: BlockType("Q8_K", LARGE, 292),
    16: BlockType("IQ2_XXS", LARGE, 66),
    17: BlockType("IQ2_XS", LARGE, 74),
    18: BlockType("IQ3_XXS", LARGE, 98),
    19: BlockType("IQ1_S", LARGE, 50),
    20: BlockType("IQ4_NL", SMALL, 18),
    21: BlockType("IQ3_S", LARGE, 110),
    22: BlockType("IQ2_S", LARGE, 82),
    23: BlockType("IQ4_XS", LARGE, 136),
    29: BlockType("IQ1_M", LARGE, 56),
    31: BlockType("Q4_0_4_4", SMALL, 18),
    32: BlockType("Q4_0_4_8", SMALL, 18),
    33: BlockType("Q4_0_8_8", SMALL, 18),
    34: BlockType("TQ1_0", LARGE, 54),
    35: BlockType("TQ2_0", LARGE, 66),
    39: BlockType("MXFP4", SMALL, 17),
    40: BlockType("NVFP4", 64, 36),
    41: BlockType("Q1_0", 128, 18),
}
TYPES: dict[int, DType] = {**NUMBERS, **BLOCKS}
"""{number in the file: type}; those without a scheme are here so that errors can name them."""
NUMBER_OF: dict[str, int] = {str(dtype): number for number, dtype in TYPES.items()}
"""{name of a type: its number in the file}"""
