"""Random weights of every scheme that the operations `dequant_gguf` and `dequant_groups` decode."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mezzotint.bench.random_parts import random_parts
from mezzotint.kernels.backends.dequantize import BACKEND
from mezzotint.kernels.ops.dequant_gguf.reference import dequant_gguf_reference
from mezzotint.kernels.ops.dequant_gguf.types import TYPES
from mezzotint.kernels.ops.dequant_groups.reference import dequant_groups_reference
from mezzotint.schemes import (
    AWQ_CENTERED,
    AWQ_W4A16,
    CODEBOOK4,
    FP8,
    FP8_E5M2,
    FP8_GROUPS,
    INT8,
    INT_GROUPS,
    LLM_INT8,
    MXFP8,
    NVFP4,
    Parts,
    Scheme,
    schemes,
)
from mezzotint.tensor import PLAIN, QuantTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
LAYERS = (
    *("gguf_q8_0", "gguf_q4_k", "gguf_iq4_xs", "codebook4", "int4_groups", "int8_groups"),
    *("fp8", "mxfp8", "nvfp4"),
)
"""Schemes of the layers that are multiplied in tests."""
Made = tuple[Scheme, dict[str, Tensor]]


class Maker:
    """Random parts of matrices with these rows and columns; every byte occurs, also NaN."""

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        self.rows, self.columns = rows, columns
        self.chance = torch.Generator().manual_seed(seed)

    def codes(self, bits: int) -> Tensor:
        return self.bytes(self.rows, self.columns * bits // 8)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=self.chance, dtype=torch.uint8)

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.chance).to(dtype)

    def groups(self, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.numbers(self.rows, self.columns // size, dtype=dtype)

    def int_groups(self) -> Iterator[Made]:
        for bits, scheme in INT_GROUPS.items():
            for dtype in FLOATS:
                parts = {"codes": self.codes(bits), "block_scale": self.groups(24, dtype)}
                yield scheme, parts
                yield scheme, parts | {"block_zero": self.groups(24, dtype)}
            yield scheme, parts | {"zero_point": self.bytes(self.rows, self.columns // 24)}

    def four_bits(self) -> Iterator[Made]:
        for dtype in FLOATS:
            scale, zero = self.groups(64, dtype), self.groups(64, dtype)
            parts = {"codes": self.codes(4), "block_scale": scale, "block_zero": zero}
            yield AWQ_CENTERED, parts
            yield AWQ_W4A16, parts
        parts = {"codes": self.codes(4), "block_scale": self.groups(32)}
        yield CODEBOOK4, parts | {"codebook": self.numbers(16)}
        scale = self.bytes(self.rows, self.columns // 16).view(E4M3)
        for outer in (self.numbers(), self.numbers(1), self.numbers(self.rows)):
            yield NVFP4, {"codes": self.codes(4), "block_scale": scale, "global_scale": outer}

    def eight_bits(self) -> Iterator[Made]:
        codes = self.codes(8)
        for shape in ((), (1,), (self.rows,), (self.rows, 1)):
            scale = self.numbers(*shape)
            yield FP8, {"codes": codes.view(E4M3), "weight_scale": scale}
            yield FP8_E5M2, {"codes": codes.view(E5M2), "weight_scale": scale}
            yield INT8, {"codes": codes.view(torch.int8), "weight_scale": scale}
        yield LLM_INT8, {"codes": codes.view(torch.int8), "row_amax": self.numbers(self.rows)}
        for dtype in FLOATS:
            for code in (E4M3, E5M2):
                yield FP8_GROUPS, {"codes": codes.view(code), "block_scale": self.groups(48, dtype)}
        scale = self.bytes(self.rows, self.columns // 32).view(E8M0)
        yield MXFP8, {"codes": codes.view(E4M3), "block_scale": scale}

    def gguf(self) -> Iterator[Made]:
        for name, scheme in schemes().items():
            if name.startswith("gguf_"):
                (shape,) = scheme.part("codes").shapes(self.rows, self.columns)
                yield scheme, {"codes": self.bytes(*shape)}


def packed_weights(rows: int, columns: int, seed: int = 0) -> Iterator[QuantTensor]:
    """Yield prepared weights; `columns` is a multiple of 768."""
    maker = Maker(rows, columns, seed)
    for kind in (maker.gguf, maker.int_groups, maker.four_bits, maker.eight_bits):
        for scheme, parts in kind():
            weight = QuantTensor(scheme, PLAIN, (rows, columns), parts)
            yield replace(weight, prepared=BACKEND.prepare(weight))


def random_weight(name: str, device: torch.device) -> QuantTensor:
    """Return a weight of the scheme whose numbers are those of a model's layer."""
    shape = 96, 768
    return QuantTensor(schemes()[name], PLAIN, shape, random_parts(schemes()[name], shape, device))


def expected(weight: QuantTensor, dtype: torch.dtype) -> Tensor:
    """Return what the operation of this weight's scheme is defined to compute."""
    if weight.scheme.name in TYPES:
        return dequant_gguf_reference(weight.parts["codes"], weight.scheme, dtype)
    return dequant_groups_reference(weight, dtype)


def same_numbers(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two tensors agree in every bit, except for those of a NaN."""
    numbers = ~theirs.isnan()
    signs = torch.equal(torch.signbit(ours[numbers]), torch.signbit(theirs[numbers]))
    return (
        torch.equal(ours.isnan(), ~numbers)
        and torch.equal(ours[numbers], theirs[numbers])
        and signs
    )


def described(weight: QuantTensor) -> str:
    """Return the scheme and the parts of a weight, for messages."""
    return f"{weight.scheme.name} {_kinds(weight.parts)}"


def _kinds(parts: Parts) -> dict[str, str]:
    return {name: f"{part.dtype} {list(part.shape)}" for name, part in parts.items()}
