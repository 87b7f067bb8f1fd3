#!/usr/bin/env python3
"""Write the golden files of optimum-quanto beside this script, or `--compare N` matrices.

A development tool; it needs optimum-quanto 0.2.7, and runs on the CPU with PYTHONPATH=src:tests.
"""

from pathlib import Path

import torch
from optimum.quanto import freeze, qfloat8_e5m2, qint2, qint4, qtype, qtypes, quantize
from optimum.quanto.tensor import WeightQBitsTensor, WeightQBytesTensor, quantize_weight
from optimum.quanto.tensor.optimizers import MaxOptimizer
from torch import Tensor, nn

from support.tool_goldens import ToolFile, ToolLayer, run

HERE = Path(__file__).resolve().parent
NAMES = ("qint8", "qfloat8_e4m3fn", "qfloat8_e5m2", "qint4", "qint2")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
VARIANTS = {
    f"{name}_{str(dtype).removeprefix('torch.')}": (qtypes.get(name, qfloat8_e5m2), dtype)
    for name in NAMES
    for dtype in DTYPES
}


def quantized(matrix: Tensor, kind: qtype, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the state dict of a layer that the tool quantized and froze."""
    model = nn.Sequential(nn.Linear(matrix.shape[1], len(matrix))).to(dtype)
    model[0].weight.data, model[0].bias.data = matrix.to(dtype), torch.zeros(len(matrix)).to(dtype)
    quantize(model, weights=kind)
    freeze(model)
    return {name.removeprefix("0."): value.clone() for name, value in model.state_dict().items()}


def decoded(stored: dict[str, Tensor], kind: qtype, shape: torch.Size) -> Tensor:
    """Return what the tool decodes of saved tensors, without the kernels of one device."""
    tensors = {name.removeprefix("weight."): value for name, value in stored.items()}
    if kind.bits == 8:
        weight = WeightQBytesTensor.load_from_state_dict(
            tensors, "", kind, 0, shape, (shape[1], 1), None, []
        )
    else:
        size = shape.numel() // len(tensors["_scale"])
        weight = WeightQBitsTensor.load_from_state_dict(
            tensors, "", kind, 0, size if size < shape[1] else None, shape, (shape[1], 1), []
        )
    return weight.dequantize()


def layer(matrix: Tensor, kind: qtype, dtype: torch.dtype) -> ToolLayer:
    matrix = matrix if len(matrix) > 1 else matrix.repeat(2, 1)  # The tool refuses a single row.
    matrix = matrix.clamp(-3e4, 3e4)  # FP16 holds the span of no larger ones.
    stored = quantized(matrix, kind, dtype)
    return ToolLayer(stored, decoded(stored, kind, matrix.shape))


def with_zero_points(matrix: Tensor, kind: qtype) -> ToolLayer:
    """Quantize with integer zero points, in groups of 32."""
    scale, shift = MaxOptimizer()(matrix, kind, 0, 32, zeropoint=True)
    weight = quantize_weight(matrix, kind, 0, scale, shift, group_size=32, optimized=False)
    stored: dict[str, Tensor] = {"bias": torch.zeros(len(matrix))}
    weight.save_to_state_dict(stored, "weight.", False)
    return ToolLayer({n: v.detach() for n, v in stored.items()}, weight.dequantize().detach())


def layers() -> dict[str, ToolLayer]:
    torch.manual_seed(0)
    matrix, odd, wide = torch.randn(20, 64), torch.randn(7, 40) * 1e-3, torch.randn(9, 160)
    matrix[3, :32] = 0
    found = {}
    for name, variant in VARIANTS.items():
        found[f"{name}.even"] = layer(matrix, *variant)
        found[f"{name}.odd"] = layer(odd, *variant)
        if variant[0].bits < 8:
            found[f"{name}.wide"] = layer(wide, *variant)
    for kind in (qint4, qint2):
        found[f"{kind.name}_zero"] = with_zero_points(matrix, kind)
    return found


if __name__ == "__main__":
    variants = {
        name: (lambda matrix, variant=variant: layer(matrix, *variant))
        for name, variant in VARIANTS.items()
    }
    variants |= {
        f"{kind.name}_zero": (lambda matrix, kind=kind: with_zero_points(matrix, kind))
        for kind in (qint4, qint2)
    }
    run(
        HERE,
        layers,
        lambda matrix: layer(matrix, qint4, torch.bfloat16),
        variants,
        ToolFile({"quant_method": "quanto", "weights_dtype": "int4"}),
        multiple=160,
    )
