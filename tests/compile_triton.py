"""Compile every kernel in Triton for Hopper, and print its name and the bytes of its machine code.

A program of its own, because Triton decides on import whether kernels are compiled or interpreted.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
HALVES, REAL, BYTES, E4M3 = "*bf16", "*fp32", "*u8", "*fp8e4nv"
Call = tuple[str, str, int, list[str], dict[str, Any]]
"""Module, kernel, warps, the types of its leading parameters that are pointers, and its constants; the others are
int32."""


def calls() -> Iterator[Call]:
    for kind, group, block in ((0, 16, E4M3), (1, 64, HALVES), (2, 64, HALVES)):
        for column, low_rank in ((False, False), (True, False), (True, True)):
            pointers = [BYTES, block, REAL, REAL, REAL, HALVES, HALVES, E4M3]
            constants = {"KIND": kind, "UNIT": 1.0, "GROUP": group, "HAS_COLUMN": column, "HAS_LOW_RANK": low_rank}
            tiles = {"BY_COLUMN": False, "RANK": 32, "ROWS": 16, "COLUMNS": 256}
            yield "expand", "_expand", 4, pointers, constants | tiles
    for kind, group, zero in ((0, 16, False), (2, 64, True)):
        constants = {"KIND": kind, "UNIT": 1.0, "GROUP": group, "HAS_ZERO": zero, "VECTORS": 3, "WIDTH": 4}
        yield "gemv", "_gemv4", 4, [HALVES, BYTES, HALVES, HALVES, REAL, REAL], constants | {"ROWS": 8, "COLUMNS": 1024}
    for out in (HALVES, BYTES):
        yield "rope", "_norm_rope", 4, [HALVES] * 5 + [REAL, REAL, out], {"EPS": 1e-6, "WIDTH": 128, "HEADS": 16}
    yield "round", "_round_into", 4, [HALVES, REAL, E4M3], {"COLUMNS": 1024}
    for gated, beside, columns in (
        (False, False, 16384),
        (False, True, 16384),
        (True, False, 16384),
        (True, False, 32768),
    ):
        constants = {"GATED": gated, "HAS_BESIDE": beside, "COLUMNS": columns, "BEFORE": 4096 if beside else 1}
        yield "round", "_activation_round", 16, [HALVES, HALVES, E4M3, REAL], constants


def machine_code(module: str, name: str, warps: int, pointers: list[str], constants: dict[str, Any]) -> bytes:
    kernel = getattr(importlib.import_module(f"mezzotint.kernels.triton_ops.{module}"), name)
    others = [parameter for parameter in kernel.arg_names if parameter not in constants]
    types = dict(zip(others, pointers + ["i32"] * len(others), strict=False))
    signature = {parameter: types.get(parameter, "constexpr") for parameter in kernel.arg_names}
    places = {(kernel.arg_names.index(parameter),): value for parameter, value in constants.items()}
    source, options = ASTSource(kernel, signature, places), {"num_warps": warps}
    code: bytes = triton.compile(source, target=HOPPER, options=options).asm["cubin"]
    return code


if __name__ == "__main__":
    for call in calls():
        print(call[1], call[4], len(machine_code(*call)))
