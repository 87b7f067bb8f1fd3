#!/usr/bin/env python3
"""Write the golden files of convert_to_quant beside this script, or `--compare N` matrices.

A development tool; it needs convert_to_quant 1.3.4, and runs on the CPU with PYTHONPATH=src:tests.
"""

from pathlib import Path

import torch
from convert_to_quant.comfy.quant_ops import (
    BlockWiseFP8Layout,
    BlockWiseINT8Layout,
    RowWiseFP8Layout,
)
from convert_to_quant.utils.comfy_quant import create_comfy_quant_tensor
from torch import Tensor

from support.tool_goldens import ToolFile, ToolLayer, run

HERE = Path(__file__).resolve().parent
FORMS = {
    "float8_e4m3fn_rowwise": (RowWiseFP8Layout, {}),
    "float8_e4m3fn_blockwise": (BlockWiseFP8Layout, {}),
    "int8_blockwise": (BlockWiseINT8Layout, {"is_weight": True}),
}
VARIANTS = {
    "fp8_rows": ("float8_e4m3fn_rowwise", None),
    "fp8_blocks16": ("float8_e4m3fn_blockwise", 16),
    "fp8_blocks64": ("float8_e4m3fn_blockwise", 64),
    "int8_blocks16": ("int8_blockwise", 16),
    "int8_blocks64": ("int8_blockwise", 64),
}


def quantize(matrix: Tensor, form: str, side: int | None) -> ToolLayer:
    """Quantize a matrix, whose rows are repeated to whole blocks, as the tool needs them."""
    layout, options = FORMS[form]
    options = options if side is None else options | {"block_size": side}
    rows = -(-len(matrix) // (side or 1)) * (side or 1)
    matrix = matrix.repeat(-(-rows // len(matrix)), 1)[:rows].float()
    codes, said = layout.quantize(matrix, **options)
    stored = {"weight": codes, "weight_scale": said["scale"]}
    stored["comfy_quant"] = create_comfy_quant_tensor(form, side, orig_dtype="torch.bfloat16")
    return ToolLayer(stored, layout.dequantize(codes, **said))


def layers() -> dict[str, ToolLayer]:
    torch.manual_seed(0)
    matrix, odd = torch.randn(20, 128), torch.randn(7, 192) * 1e-3
    matrix[3] = 0
    found = {}
    for name, variant in VARIANTS.items():
        found[f"{name}.even"] = quantize(matrix, *variant)
        found[f"{name}.odd"] = quantize(odd, *variant)
    return found


if __name__ == "__main__":
    run(
        HERE,
        layers,
        lambda matrix: quantize(matrix, *VARIANTS["fp8_blocks16"]),
        {
            name: (lambda matrix, variant=variant: quantize(matrix, *variant))
            for name, variant in VARIANTS.items()
        },
        ToolFile(),
        multiple=64,
    )
