#!/usr/bin/env python3
"""Write the golden files of musubi-tuner beside this script, or `--compare N` matrices.

A development tool; it needs musubi-tuner at commit MUSUBI, and runs on the CPU with
PYTHONPATH=src:tests:MUSUBI_TUNER/src.
"""

from pathlib import Path
from typing import Any

import torch
from musubi_tuner.modules.fp8_optimization_utils import (
    fp8_linear_forward_patch,
    optimize_state_dict_with_fp8,
)
from torch import Tensor, nn

from support.tool_goldens import ToolFile, ToolLayer, run

MUSUBI = "30c658c4f4b0bf05038b3346eff9670259b10fc7"
HERE = Path(__file__).resolve().parent
VARIANTS = {
    "blocks16": {"block_size": 16},
    "blocks32": {"block_size": 32},
    "blocks64": {"block_size": 64},
    "blocks16_e5m2": {"block_size": 16, "exp_bits": 5, "mantissa_bits": 2},
    "rows": {"quantization_mode": "channel"},
    "matrix": {"quantization_mode": "tensor"},
}


def quantize(
    matrix: Tensor, options: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> ToolLayer:
    """Quantize as the tool does, and let its layer multiply the identity.

    dtype   of the matrix, which is that of the scales as well
    """
    state = {"x.weight": matrix.to(dtype)}
    optimize_state_dict_with_fp8(state, "cpu", None, None, **options)
    stored = {name.removeprefix("x."): value for name, value in state.items()}
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(stored["weight"], requires_grad=False)
    layer.register_buffer("scale_weight", stored["scale_weight"])
    identity = torch.eye(matrix.shape[1], dtype=dtype)
    return ToolLayer(stored, fp8_linear_forward_patch(layer, identity).t().contiguous())


def layers() -> dict[str, ToolLayer]:
    torch.manual_seed(0)
    matrix, odd = torch.randn(20, 128), torch.randn(7, 192) * 1e-3
    matrix[3] = 0
    found = {}
    for name, options in VARIANTS.items():
        found[f"{name}.even"] = quantize(matrix, options)
        found[f"{name}.odd"] = quantize(odd, options, torch.float32)
    return found


if __name__ == "__main__":
    run(
        HERE,
        layers,
        lambda matrix: quantize(matrix, VARIANTS["blocks16"]),
        {
            name: (lambda matrix, options=options: quantize(matrix, options))
            for name, options in VARIANTS.items()
            if name.startswith("blocks")  # Without blocks, nothing shows whose file it is.
        },
        ToolFile(),
        multiple=64,
    )
