"""The schemes that only comfy-kitchen has: its own dequantization and products, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from comfy_kitchen.backends.eager.convrot_w4a4 import prepare_int4_weight_for_int8_linear
from comfy_kitchen.backends.eager.quantization import int8_linear
from comfy_kitchen.tensor import (
    AsymW4A8Int8Layout,
    TensorCoreAWQW4A16Layout,
    TensorCoreConvRotW4A4Layout,
    TensorCoreFP8Layout,
    TensorWiseINT8Layout,
    convrot_w4a4_linear,
    w4a8_int8_linear,
)
from torch import Tensor

from mezzotint.schemes import (
    AWQ_CENTERED,
    FP8_E5M2,
    INT4_ROWS,
    INT4_ROWS_A8,
    INT8,
    W4A8,
    W6A8,
    Parts,
    Scheme,
)
from mezzotint.schemes.rotation import regular_hadamard

MATRICES = 1000
ROTATIONS = (4, 16, 64, 256)
TOLERANCE = 2e-6
"""Relative error of products: both sides sum in float32, in another order."""
Made = tuple[Tensor, Parts]
"""A matrix as comfy-kitchen dequantizes it in float32, and the parts that stand for it."""


def sizes(chance: torch.Generator) -> tuple[int, int, int]:
    """Return rows (often odd), columns (multiples of 64) and the group of the rotation."""
    rows, groups, choice = torch.randint(1, 40, (3,), generator=chance).tolist()
    rotation = ROTATIONS[choice % len(ROTATIONS)]
    return rows, max(64, rotation) * (1 + groups % 3), rotation


def some_bytes(chance: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=chance).to(torch.int8)


def scales(chance: torch.Generator, *shape: int) -> Tensor:
    """Return positive numbers of eight magnitudes, and a few zeros."""
    powers = torch.randint(-6, 3, shape, generator=chance)
    some = torch.rand(shape, generator=chance) * 10.0**powers
    return torch.where(torch.rand(shape, generator=chance) < 0.02, 0.0, some)


def int8(chance: torch.Generator) -> Made:
    rows, columns, rotation = sizes(chance)
    codes, scale = some_bytes(chance, rows, columns), scales(chance, rows, 1)
    scale = scale if rows % 3 else scale[0, 0]
    rotated = rows % 2 == 0
    params = TensorWiseINT8Layout.Params(
        scale, torch.float32, (rows, columns), convrot=rotated, convrot_groupsize=rotation
    )
    parts = {"codes": codes, "weight_scale": scale}
    parts |= {"rotation": regular_hadamard(rotation)} if rotated else {}
    return TensorWiseINT8Layout.dequantize(codes, params), parts


def int4_rows(chance: torch.Generator) -> Made:
    rows, columns, rotation = sizes(chance)
    codes, scale = some_bytes(chance, rows, columns // 2), scales(chance, rows)
    params = TensorCoreConvRotW4A4Layout.Params(
        scale, torch.float32, (rows, columns), convrot_groupsize=rotation
    )
    parts = {"codes": codes.view(torch.uint8), "weight_scale": scale}
    parts |= {"rotation": regular_hadamard(rotation)}
    return TensorCoreConvRotW4A4Layout.dequantize(codes, params), parts


def w4a8(chance: torch.Generator, bits: int = 4) -> Made:
    rows, columns, rotation = sizes(chance)
    group = (16, 32, 64)[rows % 3] if bits == 6 else (4, 8, 16, 32, 64)[rows % 5]
    codes = some_bytes(chance, rows, columns * bits // 8)
    group_scale = (scales(chance, rows, columns // group) * 1e2).clamp(max=448)
    group_scale = group_scale.to(torch.float8_e4m3fn if columns % 128 else torch.float32)
    row_scale = scales(chance, rows)
    codebook = torch.randn(16, generator=chance) if bits == 4 and rows % 2 else None
    params = AsymW4A8Int8Layout.Params(
        group_scale,
        torch.float32,
        (rows, columns),
        s_channel=row_scale,
        codebook=codebook,
        group_size=group,
        convrot_groupsize=rotation,
    )
    parts = {"codes": codes.view(torch.uint8), "block_scale": group_scale}
    parts |= {"channel_scale": row_scale, "rotation": regular_hadamard(rotation)}
    parts |= {} if codebook is None else {"codebook": codebook}
    return AsymW4A8Int8Layout.dequantize(codes, params), parts


def w6a8(chance: torch.Generator) -> Made:
    return w4a8(chance, bits=6)


def awq(chance: torch.Generator) -> Made:
    rows, columns, _ = sizes(chance)
    dtype = (torch.bfloat16, torch.float16, torch.float32)[rows % 3]
    codes = some_bytes(chance, rows, columns // 2)
    scale = scales(chance, columns // 64, rows).to(dtype)
    zero = torch.randn(columns // 64, rows, generator=chance).to(dtype)
    params = TensorCoreAWQW4A16Layout.Params(scale, torch.float32, (rows, columns), zeros=zero)
    parts = {"codes": codes.view(torch.uint8), "block_scale": scale.t(), "block_zero": zero.t()}
    return TensorCoreAWQW4A16Layout.dequantize(codes, params), parts


def e5m2(chance: torch.Generator) -> Made:
    rows, columns, _ = sizes(chance)
    values = torch.randn(rows, columns, generator=chance) * 10.0 ** (rows % 9 - 4)
    codes, scale = values.to(torch.float8_e5m2), scales(chance, 1)[0] + 1e-9
    params = TensorCoreFP8Layout.Params(scale, torch.float32, (rows, columns))
    return TensorCoreFP8Layout.dequantize(codes, params), {"codes": codes, "weight_scale": scale}


MAKERS: dict[str, tuple[Scheme, Callable[[torch.Generator], Made]]] = {
    "int8": (INT8, int8),
    "int4_rows": (INT4_ROWS, int4_rows),
    "w4a8": (W4A8, w4a8),
    "w6a8": (W6A8, w6a8),
    "awq_centered": (AWQ_CENTERED, awq),
    "fp8_e5m2": (FP8_E5M2, e5m2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_thousand_matrices_decode_as_comfy_kitchen_decodes_them(name: str) -> None:
    scheme, make = MAKERS[name]
    chance = torch.Generator().manual_seed(len(name))
    for number in range(MATRICES):
        theirs, parts = make(chance)
        for part in parts:
            shapes = scheme.part(part).shapes(*theirs.shape)
            assert tuple(parts[part].shape) in shapes
        assert torch.equal(scheme.dequantize(parts), theirs), number


def near(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).norm() <= TOLERANCE * theirs.norm())


def weights(rows: int = 48, columns: int = 512) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, columns, generator=chance)
    x = torch.randn(2, 5, columns, generator=chance)
    x[0, 0], x[0, 1] = 0, x[0, 1] * 1e4
    return values, x


@pytest.mark.parametrize("rotated", [True, False])
def test_int8_products_equal_comfy_kitchens(rotated: bool) -> None:
    values, x = weights()
    codes, params = TensorWiseINT8Layout.quantize(values, per_channel=True, convrot=rotated)
    parts = {"codes": codes, "weight_scale": params.scale}
    parts |= {"rotation": regular_hadamard(256)} if rotated else {}
    theirs = int8_linear(x, codes, params.scale, None, torch.float32, convrot=rotated)
    assert near(INT8.linear(x, parts, quantize=True), theirs)


@pytest.mark.parametrize("linear_dtype", ["int4", "int8"])
def test_w4a4_products_equal_comfy_kitchens(linear_dtype: str) -> None:
    """With INT8 inputs, its CUDA backend multiplies the codes as INT8; the eager one does not."""
    values, x = weights()
    codes, params = TensorCoreConvRotW4A4Layout.quantize(values)
    parts = {"codes": codes.view(torch.uint8), "weight_scale": params.scale}
    parts |= {"rotation": regular_hadamard(256)}
    if linear_dtype == "int4":
        theirs = convrot_w4a4_linear(x, codes, params.scale)
        assert near(INT4_ROWS.linear(x, parts, quantize=True), theirs)
    else:
        unpacked = prepare_int4_weight_for_int8_linear(codes)
        theirs = int8_linear(x, unpacked, params.scale, None, torch.float32, convrot=True)
        assert near(INT4_ROWS_A8.linear(x, parts, quantize=True), theirs)


@pytest.mark.parametrize(("scheme", "bits"), [(W4A8, 4), (W6A8, 6)])
def test_w4a8_products_equal_comfy_kitchens(scheme: Scheme, bits: int) -> None:
    values, x = weights()
    codes, params = AsymW4A8Int8Layout.quantize(values, bits=bits)
    parts = {"codes": codes.view(torch.uint8), "block_scale": params.scale}
    parts |= {"channel_scale": params.s_channel, "rotation": regular_hadamard(256)}
    parts |= {} if params.codebook is None else {"codebook": params.codebook}
    theirs = w4a8_int8_linear(
        x, codes, params.scale, params.s_channel, params.codebook, out_dtype=torch.float32
    )
    assert near(scheme.linear(x, parts, quantize=True), theirs)
    error = (scheme.dequantize(parts) - values).norm() / values.norm()
    assert error < scheme.usual_error


def test_e5m2_and_awq_leave_inputs_alone() -> None:
    for scheme in (FP8_E5M2, AWQ_CENTERED):
        assert not scheme.quantizes_activation({}, dynamic=True)


def test_w4a4_weights_are_the_same_whatever_their_inputs_become() -> None:
    assert INT4_ROWS_A8.decode is INT4_ROWS.decode
