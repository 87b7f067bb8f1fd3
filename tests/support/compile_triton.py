"""Compile every Triton kernel for Hopper, and print its name and the size of its machine code.

It is a separate program, because Triton decides on import whether to compile or to interpret.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mezzotint.kernels.ops.dequant_gguf.types import TYPES
from mezzotint.kernels.ops.dequant_groups import kinds
from mezzotint.schemes import schemes

HOPPER = GPUTarget("cuda", 90, 32)
BF16, FP32, U8, I8, E4M3 = "*bf16", "*fp32", "*u8", "*i8", "*fp8e4nv"
BF16, FP32, U8, E4M3 = "*bf16", "*fp32", "*u8", "*fp8e4nv"
DEQUANT_TILE = {"TILE": 512}
Call = tuple[str, str, int, list[str], dict[str, Any]]
"""Op, kernel, warps, types of the leading pointer parameters, and constants; the rest is int32."""


def calls() -> Iterator[Call]:
    for kind, group, block in ((0, 16, E4M3), (1, 64, BF16), (2, 64, BF16)):
        for column, low_rank in ((False, False), (True, False), (True, True)):
            pointers = [U8, block, FP32, FP32, FP32, BF16, BF16, E4M3]
            constants = {
                "KIND": kind,
                "CODE_SCALE": 1.0,
                "GROUP": group,
                "HAS_COLUMN": column,
                "HAS_LOW_RANK": low_rank,
            }
            tiles = {"LOW_RANK_BEFORE_COLUMN": False, "RANK": 32, "TILE_N": 16, "TILE_K": 256}
            yield "dequant_fp8", "_dequant_fp8_kernel", 4, pointers, constants | tiles
    for kind, group, zero in ((0, 16, False), (2, 64, True)):
        constants = {
            "KIND": kind,
            "CODE_SCALE": 1.0,
            "GROUP": group,
            "HAS_ZERO": zero,
            "M": 3,
            "PADDED_M": 4,
        }
        yield (
            "gemv",
            "_gemv4_kernel",
            4,
            [BF16, U8, BF16, BF16, FP32, FP32],
            constants | {"TILE_N": 8, "TILE_K": 1024},
        )
    for out in (BF16, U8):
        yield (
            "norm_rope",
            "_norm_rope_kernel",
            4,
            [BF16] * 5 + [FP32, FP32, out],
            {"EPS": 1e-6, "WIDTH": 128, "HEADS": 16},
        )
    yield from dequantizations()
    yield "quantize_activation", "_quantize_into_kernel", 4, [BF16, FP32, E4M3], {"TILE": 1024}
    for gated, prefix, columns in (
        (False, False, 16384),
        (False, True, 16384),
        (True, False, 16384),
        (True, False, 32768),
    ):
        constants = {
            "GATED": gated,
            "HAS_PREFIX": prefix,
            "COLUMNS": columns,
            "PREFIX": 4096 if prefix else 1,
        }
        yield (
            "quantize_activation",
            "_activation_quantize_kernel",
            16,
            [BF16, BF16, E4M3, FP32],
            constants,
        )
    yield from int8_calls()


def int8_calls() -> Iterator[Call]:
    for blocks, codebook in ((False, False), (True, False), (True, True)):
        constants = {"HAS_BLOCKS": blocks, "HAS_CODEBOOK": codebook}
        tiles = {"TILE_N": 16, "TILE_K": 256}
        yield "unpack_int8", "_unpack_int8_kernel", 4, [U8, E4M3, FP32, I8], constants | tiles


def dequantizations() -> Iterator[Call]:
    for name, number in TYPES.items():
        group = schemes()[name].group
        ((_rows, block),) = schemes()[name].part("codes").shapes(1, group)
        constants = {"TYPE": number, "GROUP": group, "BLOCK_BYTES": block} | DEQUANT_TILE
        yield "dequant_gguf", "_dequant_gguf_kernel", 4, [U8, FP32, BF16], constants
    widths = {kinds.PACKED: 3, kinds.CODEBOOK: 4, kinds.E2M1: 4}
    for codes in range(kinds.E5M2 + 1):
        scales, zero = codes % (kinds.E4M3_SCALE + 1), codes % (kinds.FUSED_OFFSET + 1)
        constants = {
            "CODES": codes,
            "BITS": widths.get(codes, 8),
            "MIDDLE": 0.0,
            "SCALES": scales,
            "SCALE_RUNS": 4,
            "ZERO": zero,
            "OUTER_RUNS": 384 * (codes == kinds.E2M1),
            "FACTOR": 1.0,
        } | DEQUANT_TILE
        pointers = [U8, BF16 if scales == kinds.FLOAT else U8, U8, FP32, FP32, BF16]
        yield "dequant_groups", "_dequant_groups_kernel", 4, pointers, constants


def machine_code(
    op: str, name: str, warps: int, pointers: list[str], constants: dict[str, Any]
) -> bytes:
    kernel = getattr(importlib.import_module(f"mezzotint.kernels.ops.{op}.kernel"), name)
    arguments = [parameter for parameter in kernel.arg_names if parameter not in constants]
    types = dict(zip(arguments, pointers + ["i32"] * len(arguments), strict=False))
    signature = {parameter: types.get(parameter, "constexpr") for parameter in kernel.arg_names}
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source, options = ASTSource(kernel, signature, positions), {"num_warps": warps}
    code: bytes = triton.compile(source, target=HOPPER, options=options).asm["cubin"]
    return code


if __name__ == "__main__":
    for call in calls():
        print(call[1], call[4], len(machine_code(*call)))
