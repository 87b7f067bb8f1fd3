"""Layers of every form that INT8 tensor cores multiply."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mezzotint.schemes import INT4_ROWS, INT4_ROWS_A8, INT8, W4A8, Scheme
from mezzotint.schemes.int8 import encode_int8
from mezzotint.schemes.rotation import regular_hadamard
from mezzotint.tensor import PLAIN, QuantTensor
from support.four_bit_weights import random


def int8_forms(out: int, in_: int, group: int = 64) -> dict[str, QuantTensor]:
    """Return {name: weight [out, in]}; rotated ones mix `group` columns."""
    rotation = {"rotation": regular_hadamard(group)}
    matrix = encode_int8(random(out, in_, seed=1) * 0.05)
    one_scale = matrix | {"weight_scale": torch.tensor(3e-4)}
    rows = {"codes": random_bytes(out, in_ // 2), "weight_scale": random_scale(out, 1) / 100}
    blocks = {
        "codes": random_bytes(out, in_ // 2),
        "block_scale": (random_scale(out, in_ // 16) * 12).to(torch.float8_e4m3fn),
        "channel_scale": random_scale(out) / 1000,
    }
    codebook = {"codebook": torch.linspace(-1, 1, 16) ** 3 * 9}
    smooth = {"pre_quant_scale": torch.exp2(torch.arange(in_) % 3 - 1.0).bfloat16()}
    static = {"input_scale": torch.tensor(4 / 127)}
    parts: Mapping[str, tuple[Scheme, dict[str, Tensor]]] = {
        "int8": (INT8, matrix),
        "int8, one scale": (INT8, one_scale),
        "int8, static": (INT8, one_scale | static | smooth),
        "int8, rotated": (INT8, matrix | rotation),
        "int8, rotated, static": (INT8, matrix | rotation | static),
        "int4_rows_a8, rotated": (INT4_ROWS_A8, rows | rotation),
        "w4a8": (W4A8, blocks),
        "w4a8, codebook, rotated": (W4A8, blocks | codebook | rotation),
    }
    return {
        name: QuantTensor(scheme, PLAIN, (out, in_), values, "input_scale" not in values)
        for name, (scheme, values) in parts.items()
    }


def int4_input_form(out: int, in_: int) -> QuantTensor:
    """Return a layer whose inputs have 4 bits in the file."""
    parts = {"codes": random_bytes(out, in_ // 2), "weight_scale": random_scale(out) / 100}
    return QuantTensor(INT4_ROWS, PLAIN, (out, in_), parts, True)


def random_bytes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def random_scale(*shape: int) -> Tensor:
    """Return positive numbers between 0.5 and 1.5."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.5
