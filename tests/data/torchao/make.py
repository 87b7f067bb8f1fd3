#!/usr/bin/env python3
"""Write the golden files of torchao beside this script, or `--compare N` random matrices.

A development tool; it needs torchao 0.18, and runs on the CPU with PYTHONPATH=src:tests.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao import quantization as ao
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Float8Tensor
from torchao.quantization.granularity import PerAxis, PerBlock, PerGroup, PerRow, PerTensor
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

from support.tool_goldens import ToolFile, ToolLayer, run

HERE = Path(__file__).resolve().parent
ASYMMETRIC = ao.MappingType.ASYMMETRIC
INTS = {bits: getattr(torch, f"int{bits}") for bits in (2, 3, 4, 5, 6, 7, 8)}


def intx(bits: int, granularity: Any, **more: Any) -> Any:
    return ao.IntxWeightOnlyConfig(weight_dtype=INTS[bits], granularity=granularity, **more)


CONFIGS = {
    "int8_row": ao.Int8WeightOnlyConfig(),
    "int8_tensor": ao.Int8WeightOnlyConfig(granularity=PerTensor()),
    "int8_group": ao.Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "int8_dynamic": ao.Int8DynamicActivationInt8WeightConfig(),
    "fp8_row": ao.Float8WeightOnlyConfig(),
    **{f"int{bits}_group": intx(bits, PerGroup(32)) for bits in INTS},
    **{f"int{bits}_zero": intx(bits, PerGroup(32), mapping_type=ASYMMETRIC) for bits in INTS},
    "int4_axis": intx(4, PerAxis(0)),
}


def with_config(matrix: Tensor, config: Any) -> Any:
    """Return torchao's tensor of a linear layer with this weight."""
    model = nn.Sequential(nn.Linear(matrix.shape[1], len(matrix), bias=False)).bfloat16()
    model[0].weight.data = matrix.bfloat16()
    ao.quantize_(model, config)
    return model[0].weight


def fp8(matrix: Tensor, granularity: Any) -> Any:
    """Return what Float8DynamicActivationFloat8WeightConfig makes, which asks for a GPU."""
    inputs = QuantizeTensorToFloat8Kwargs(granularity=granularity)
    return Float8Tensor.from_hp(matrix.bfloat16(), granularity=granularity, act_quant_kwargs=inputs)


def nvfp4(matrix: Tensor, swizzled: bool, has_outer: bool) -> Any:
    outer = per_tensor_amax_to_scale(matrix.abs().max()) if has_outer else None
    return NVFP4Tensor.to_nvfp4(
        matrix.bfloat16(), per_tensor_scale=outer, is_swizzled_scales=swizzled
    )


def mxfp8(matrix: Tensor, dtype: torch.dtype, swizzled: bool) -> Any:
    return MXTensor.to_mx(matrix.bfloat16(), dtype, 32, is_swizzled_scales=swizzled)


VARIANTS: dict[str, Callable[[Tensor], Any]] = {
    **{name: (lambda m, config=config: with_config(m, config)) for name, config in CONFIGS.items()},
    "fp8_dynamic_row": lambda matrix: fp8(matrix, PerRow()),
    "fp8_dynamic_tensor": lambda matrix: fp8(matrix, PerTensor()),
    "nvfp4": lambda matrix: nvfp4(matrix, False, True),
    "nvfp4_swizzled": lambda matrix: nvfp4(matrix, True, True),
    "nvfp4_blocks": lambda matrix: nvfp4(matrix, True, False),
    "mxfp8": lambda matrix: mxfp8(matrix, torch.float8_e4m3fn, False),
    "mxfp8_swizzled": lambda matrix: mxfp8(matrix, torch.float8_e4m3fn, True),
    "mxfp8_e5m2": lambda matrix: mxfp8(matrix, torch.float8_e5m2, False),
    "fp8_block": lambda matrix: fp8(matrix.repeat(16, 1), PerBlock([16, 16])),
}


def quantize(matrix: Tensor, make: Callable[[Tensor], Any]) -> ToolLayer:
    weight = make(matrix)
    tensors, metadata = flatten_tensor_state_dict({"layer.weight": weight})
    stored = {name.removeprefix("layer."): value for name, value in tensors.items()}
    return ToolLayer(stored, weight.dequantize(), {"weight": metadata["layer.weight"]})


def names(entries: dict[str, str]) -> dict[str, str]:
    """Return the entries with the list of names that torchao's reader starts from."""
    return entries | {"tensor_names": json.dumps(list(entries))}


def layers() -> dict[str, ToolLayer]:
    torch.manual_seed(0)
    matrix, small = torch.randn(16, 64), torch.randn(16, 96) * 1e-3
    zeros = matrix.clone()
    zeros[3] = 0  # FP8 would make them NaN
    found = {
        f"{name}.even": quantize(matrix if "fp8" in name else zeros, make)
        for name, make in VARIANTS.items()
    }
    few = ("int8_row", "int4_zero", "fp8_row", "fp8_block")
    return found | {f"{name}.small": quantize(small, VARIANTS[name]) for name in few}


if __name__ == "__main__":
    run(
        HERE,
        layers,
        lambda matrix: quantize(matrix, VARIANTS["int8_dynamic"]),
        {name: (lambda m, make=make: quantize(m, make)) for name, make in VARIANTS.items()},
        ToolFile({"quant_method": "torchao"}, metadata=names),
        multiple=32,
    )
