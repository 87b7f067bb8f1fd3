#!/usr/bin/env python3
"""Write the golden files of SDNQ beside this script, or `--compare N` random matrices.

A development tool; it needs sdnq 0.2.8, and runs on the CPU with PYTHONPATH=src:tests.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sdnq.quantizer import sdnq_quantize_layer_weight
from torch import Tensor

from support.tool_goldens import WEIGHTS, ToolFile, ToolLayer, compare, write

HERE = Path(__file__).resolve().parent
DTYPES = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)] + ["float8_e4m3fn"]


def quantize(matrix: Tensor, dtype: str, **more: Any) -> ToolLayer:
    """Quantize and decode as SDNQ does for a linear layer, in the dtype of the scales."""
    dequantizer, data = sdnq_quantize_layer_weight(
        matrix.float(), layer_class_name="Linear", weights_dtype=dtype, **more
    )
    tensors = {name: value for name, value in data.items() if value is not None}
    matmul = dequantizer.use_quantized_matmul
    truth = dequantizer(
        **data, skip_quantized_matmul=matmul, skip_compile=True, dtype=data["scale"].dtype
    )
    return ToolLayer(tensors, truth.contiguous())


def config(dtype: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "sdnq", "sdnq_version": "0.2.8", "weights_dtype": dtype} | more


def layers() -> dict[str, ToolLayer]:
    """Return integer layers of all numbers of bits; the low-rank branch shows the columns."""
    torch.manual_seed(0)
    matrix = torch.randn(12, 96)
    found = {}
    for dtype in DTYPES:
        for group in (-1, 32):
            if dtype not in ("int2", "uint2", "int3", "uint3"):
                found[f"{dtype}.group{abs(group)}"] = quantize(matrix, dtype, group_size=group)
    half = {"dequantize_fp32": False, "torch_dtype": torch.bfloat16}
    found["uint4.bf16"] = quantize(matrix, "uint4", group_size=32, **half)
    found["int8.matmul"] = quantize(torch.randn(64, 96), "int8", use_quantized_matmul=True)
    return found


def write_transformed() -> None:
    """Write layers with a low-rank branch and with rotated columns, one folder each."""
    svd, rotated = {"use_svd": True, "svd_rank": 4}, {"use_hadamard": True}
    cases = {
        "svd": svd,
        "hadamard": rotated,
        "hadamard64_svd": svd | rotated | {"hadamard_group_size": 64},
    }
    torch.manual_seed(2)
    matrix, truth = torch.randn(12, 96), {}
    for name, more in cases.items():
        layer = quantize(matrix, "uint4", group_size=32, **more)
        declared = {key: value for key, value in more.items() if key != "svd_rank"}
        folder = HERE / "transformed" / name
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"layer.{key}": value.contiguous() for key, value in layer.tensors.items()}
        save_file(tensors, folder / WEIGHTS)
        entries = {"quantization_config": config("uint4", **declared)}
        (folder / "config.json").write_text(json.dumps(entries, indent=1) + "\n")
        truth[name] = layer.truth
    save_file(truth, HERE / "transformed/truth.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--compare", type=int, metavar="N")
    if number := parser.parse_args().compare:
        for each in DTYPES:
            variants = {
                f"{each} {group}": (lambda m, d=each, g=group: quantize(m, d, group_size=g))
                for group in (-1, 0, 16)
            }
            half = {"dequantize_fp32": False, "torch_dtype": torch.bfloat16}
            variants[f"{each} bf16"] = lambda m, d=each, more=half: quantize(m, d, **more)
            print(compare(variants, number, 8, ToolFile(None, config(each))))
    else:
        write_transformed()
        others = {dtype: ["*"] for dtype in DTYPES if dtype[-1] in "4578"}
        write(
            HERE,
            layers(),
            lambda matrix: quantize(matrix, "uint4", group_size=16),
            ToolFile(config("uint4", group_size=16), config("int6", modules_dtype_dict=others)),
        )
