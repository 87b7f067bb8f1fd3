#!/usr/bin/env python3
"""Write the golden files of AutoRound beside this script, or `--compare N` matrices.

A development tool; it needs auto-round 0.16.1 and py-cpuinfo, and runs on the CPU with
PYTHONPATH=src:tests.
"""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from support.tool_goldens import ToolFile, ToolLayer, run

sys.modules["datasets"] = MagicMock()  # AutoRound imports it for calibration alone.
from auto_round.export.export_to_awq.utils import WQLinear_GEMM  # noqa: E402
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear  # noqa: E402

HERE = Path(__file__).resolve().parent
GROUP = 32
VARIANTS = {
    f"{packing}{bits}{'' if symmetric else '_zero'}": (packing, bits, symmetric)
    for packing, numbers in (("gptq", range(2, 9)), ("awq", range(4, 8)))
    for bits in numbers
    for symmetric in (True, False)
}


def ranges(matrix: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero of each group, [out, in/GROUP]."""
    groups = matrix.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    middle = 2 ** (bits - 1)
    scale = torch.maximum(-low, high) / middle if symmetric else (high - low) / (2**bits - 1)
    scale = scale.clamp(1e-5, 6e4).half().float()  # AutoRound's smallest scale is 1e-5.
    zero = torch.full_like(scale, middle) if symmetric else (-low / scale).round()
    return scale, zero.clamp(1, 2**bits - 1)


def quantize(matrix: Tensor, packing: str, bits: int, symmetric: bool) -> ToolLayer:
    """Pack as the tool exports, and let its layer multiply the identity."""
    out = -(-len(matrix) // GROUP) * GROUP  # Both packings need whole words of zeros.
    matrix = matrix.repeat(-(-out // len(matrix)), 1)[:out].clamp(-6e4, 6e4)
    linear = nn.Linear(matrix.shape[1], out, bias=False)
    linear.weight.data = matrix
    scale, zero = ranges(matrix, bits, symmetric)
    if packing == "awq":
        layer = WQLinear_GEMM.from_linear(
            linear, bits, GROUP, scales=scale.t(), zeros=zero.t(), device="cpu"
        )
    else:
        layer = QuantLinear(bits, GROUP, matrix.shape[1], out, bias=False)
        layer.pack(linear, scale, zero.to(torch.int32), None, device="cpu")
    truth = layer(torch.eye(matrix.shape[1]).half()).reshape(matrix.shape[1], out).t()
    return ToolLayer(dict(layer.state_dict()), truth.contiguous().detach())


def layers() -> dict[str, ToolLayer]:
    torch.manual_seed(0)
    matrix, small = torch.randn(32, 64), torch.randn(64, 96) * 1e-2
    matrix[3] = 0
    found = {name: quantize(matrix, *variant) for name, variant in VARIANTS.items()}
    few = ("gptq3_zero", "gptq4", "awq4_zero")
    return found | {f"{name}.small": quantize(small, *VARIANTS[name]) for name in few}


if __name__ == "__main__":
    declared = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    run(
        HERE,
        layers,
        lambda matrix: quantize(matrix, *VARIANTS["gptq4_zero"]),
        {
            name: (lambda matrix, variant=variant: quantize(matrix, *variant))
            for name, variant in VARIANTS.items()
        },
        ToolFile(
            declared | {"bits": 4, "group_size": GROUP, "sym": False, "data_type": "int"}, declared
        ),
        multiple=32,
    )
