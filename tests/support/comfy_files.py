"""Layers as comfy-kitchen writes them in each of ComfyUI's formats, and what they stand for."""

import json
from collections.abc import Callable, Mapping

import torch
from comfy_kitchen.tensor import (
    AsymW4A8Int8Layout,
    TensorCoreAWQW4A16Layout,
    TensorCoreConvRotW4A4Layout,
    TensorCoreFP8Layout,
    TensorWiseINT8Layout,
)
from torch import Tensor

ROTATIONS = (256, 64, 16, 4)
E5M2_MAX = 57344.0
Stored = tuple[dict[str, Tensor], dict[str, object], Tensor]
"""The tensors of a layer by suffix, its note, and its weights as comfy-kitchen dequantizes them."""


def marker(note: Mapping[str, object]) -> Tensor:
    return torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)


def rotation(matrix: Tensor) -> int:
    """Return the largest group that ConvRot can rotate."""
    return next(size for size in ROTATIONS if matrix.shape[1] % size == 0)


def int8(matrix: Tensor, per_row: bool = False, convrot: bool = False) -> Stored:
    size = rotation(matrix)
    codes, params = TensorWiseINT8Layout.quantize(
        matrix, per_channel=per_row or convrot, convrot=convrot, convrot_groupsize=size
    )
    note: dict[str, object] = {"format": "int8_tensorwise"}
    note |= {"convrot": True, "convrot_groupsize": size} if convrot else {}
    tensors = TensorWiseINT8Layout.state_dict_tensors(codes, params)
    return tensors, note, TensorWiseINT8Layout.dequantize(codes, params)


def w4a4(matrix: Tensor, linear_dtype: str = "int4") -> Stored:
    size = rotation(matrix)
    codes, params = TensorCoreConvRotW4A4Layout.quantize(matrix, convrot_groupsize=size)
    note: dict[str, object] = {"format": "convrot_w4a4", "convrot_groupsize": size}
    note |= {"linear_dtype": linear_dtype} if linear_dtype != "int4" else {}
    tensors = TensorCoreConvRotW4A4Layout.state_dict_tensors(codes, params)
    return tensors, note, TensorCoreConvRotW4A4Layout.dequantize(codes, params)


def w4a8(matrix: Tensor, bits: int = 4) -> Stored:
    size = rotation(matrix)
    codes, params = AsymW4A8Int8Layout.quantize(matrix, convrot_groupsize=size, bits=bits)
    note = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": size}
    tensors = AsymW4A8Int8Layout.state_dict_tensors(codes, params)
    return tensors, note, AsymW4A8Int8Layout.dequantize(codes, params)


def awq(matrix: Tensor) -> Stored:
    """comfy-kitchen reads these and does not write them: min and max of each group of 64."""
    groups = matrix.unflatten(1, (-1, 64))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    shifted = (groups - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1) + 8
    codes = shifted.round().clamp(0, 15).flatten(1).to(torch.uint8)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8)
    scale, zero = scale.t().contiguous(), zero.t().contiguous()
    params = TensorCoreAWQW4A16Layout.Params(scale, torch.float32, tuple(matrix.shape), zeros=zero)
    tensors = TensorCoreAWQW4A16Layout.state_dict_tensors(packed, params)
    truth = TensorCoreAWQW4A16Layout.dequantize(packed, params)
    return tensors, {"format": "awq_w4a16", "group_size": 64}, truth


def e5m2(matrix: Tensor) -> Stored:
    scale = matrix.abs().max() / E5M2_MAX
    codes = (matrix / scale).to(torch.float8_e5m2)
    params = TensorCoreFP8Layout.Params(scale, torch.float32, tuple(matrix.shape))
    truth = TensorCoreFP8Layout.dequantize(codes, params)
    return {"": codes, "_scale": scale}, {"format": "float8_e5m2"}, truth


FORMS: Mapping[str, Callable[[Tensor], Stored]] = {
    "int8": int8,
    "int8 rows": lambda matrix: int8(matrix, per_row=True),
    "convrot": lambda matrix: int8(matrix, convrot=True),
    "e5m2": e5m2,
    "w4a4": w4a4,
    "w4a4 int8": lambda matrix: w4a4(matrix, "int8"),
    "w4a8": w4a8,
    "w6a8": lambda matrix: w4a8(matrix, bits=6),
    "awq": awq,
}


def stored_layer(module: str, matrix: Tensor, form: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return a layer's tensors with its marker, and its dequantized weights in float32."""
    tensors, note, truth = FORMS[form](matrix.float())
    named = {f"{module}.weight{suffix}": value for suffix, value in tensors.items()}
    return named | {f"{module}.comfy_quant": marker(note)}, truth.float()
