#!/usr/bin/env python3
"""Write torchao's quantization of the oracle matrices: tests/data/oracles/torchao.safetensors.

This development tool needs torchao 0.18, runs on the CPU, and reads the matrices of
modelopt_nvfp4.safetensors (make_modelopt.py). For each matrix:

    NAME.codes, .block_scale, .decoded    NVFP4 with ModelOpt's global scale, low nibble first
    NAME.tiles                            those block scales in the order that cuBLASLt reads
    NAME.mxfp8_codes, .mxfp8_scale        MXFP8 with scales rounded up (RCEIL), as bytes
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize
from torchao.prototype.mx_formats.utils import to_blocked

ORACLES = Path(__file__).resolve().parent
MATRIX = ".matrix"


def quantized(
    name: str, matrix: torch.Tensor, global_scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    block_scale, codes = nvfp4_quantize(matrix, 16, global_scale)
    decoded = NVFP4Tensor(codes, block_scale, 16, torch.float32, global_scale).dequantize()
    mx_scale, mx_codes = to_mx(matrix, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
    return {
        f"{name}.codes": codes.view(torch.uint8),
        f"{name}.block_scale": block_scale,
        f"{name}.decoded": decoded,
        f"{name}.tiles": to_blocked(block_scale),
        f"{name}.mxfp8_codes": mx_codes.view(torch.uint8),
        f"{name}.mxfp8_scale": mx_scale.view(torch.uint8),
    }


if __name__ == "__main__":
    inputs = load_file(ORACLES / "modelopt_nvfp4.safetensors")
    results = {}
    for key in [key for key in inputs if key.endswith(MATRIX)]:
        name = key.removesuffix(MATRIX)
        results |= quantized(name, inputs[key], inputs[f"{name}.global_scale"])
    save_file(
        {key: value.contiguous() for key, value in results.items()}, ORACLES / "torchao.safetensors"
    )
