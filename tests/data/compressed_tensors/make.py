#!/usr/bin/env python3
"""Write the golden files of compressed-tensors beside this script, or `--compare N` matrices.

A development tool; it needs compressed-tensors 0.20.1 and loguru, and runs on the CPU with
PYTHONPATH=src:tests.
"""

from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from support.tool_goldens import ToolFile, ToolLayer, run

HERE = Path(__file__).resolve().parent
FLOAT, INT, NVFP4, WORDS, MX = (
    *("float-quantized", "int-quantized", "nvfp4-pack-quantized"),
    *("pack-quantized", "mxfp8-quantized"),
)
GROUP = 32


def args(bits: int, kind: str, strategy: str, symmetric: bool = True) -> QuantizationArgs:
    sizes = {
        "group": {"group_size": GROUP},
        "tensor_group": {"group_size": 16},
        "block": {"block_structure": [16, 16]},
    }
    return QuantizationArgs(
        num_bits=bits, type=kind, strategy=strategy, symmetric=symmetric, **sizes.get(strategy, {})
    )


VARIANTS = {
    "fp8_tensor": (FLOAT, args(8, "float", "tensor")),
    "fp8_channel": (FLOAT, args(8, "float", "channel")),
    "fp8_block": (FLOAT, args(8, "float", "block")),
    "int8_tensor": (INT, args(8, "int", "tensor")),
    "int8_channel": (INT, args(8, "int", "channel")),
    "int8_group": (INT, args(8, "int", "group")),
    "int8_channel_zero": (INT, args(8, "int", "channel", False)),
    "nvfp4": (NVFP4, args(4, "float", "tensor_group")),
    **{
        f"words{bits}_{strategy}{'' if symmetric else '_zero'}": (
            WORDS,
            args(bits, "int", strategy, symmetric),
        )
        for bits in (2, 3, 4, 5, 6, 8)
        for strategy in ("group", "channel")
        for symmetric in (True, False)
    },
}


def ranges(matrix: Tensor, arguments: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Return the extremes of each scale's weights."""
    match arguments.strategy:
        case "tensor":
            parts = matrix.reshape(1, -1)
        case "channel":
            return matrix.amin(1, keepdim=True), matrix.amax(1, keepdim=True)
        case "block":
            height, width = arguments.block_structure
            rows, columns = -matrix.shape[0] % height, -matrix.shape[1] % width
            padded = torch.nn.functional.pad(matrix, (0, columns, 0, rows))
            blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
            return blocks.amin((1, 3)), blocks.amax((1, 3))
        case _:
            parts = matrix.unflatten(1, (-1, arguments.group_size))
    return parts.amin(-1), parts.amax(-1)


def quantize(matrix: Tensor, form: str, arguments: QuantizationArgs) -> ToolLayer:
    """Compress as llm-compressor does, and decompress with the tool."""
    matrix = matrix.bfloat16()
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {"weight": matrix}
    low, high = ranges(matrix.float(), arguments)
    more = {}
    if form == NVFP4:
        more["global_scale"] = generate_gparam(low.amin().reshape(1), high.amax().reshape(1))
        state["weight_global_scale"] = more["global_scale"]
    scale, zero = calculate_qparams(low, high, arguments, **more)
    state["weight_scale"] = scale if form == NVFP4 else scale.bfloat16()
    state["weight_zero_point"] = zero.to(torch.int8)
    if arguments.symmetric:
        del state["weight_zero_point"]
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    readable = dict(stored)
    if "weight_zero_point" in stored and form == WORDS:
        # compressed-tensors 0.20.1 views words as bytes, and fails on odd strides of one column.
        zero = stored["weight_zero_point"].t().clone(memory_format=torch.contiguous_format)
        readable["weight_zero_point"] = zero.as_strided(zero.shape, (zero.shape[1], 1)).t()
    truth = compressor.decompress(readable, scheme)["weight"]
    return ToolLayer({name: value.detach() for name, value in stored.items()}, truth)


def layers() -> dict[str, ToolLayer]:
    torch.manual_seed(0)
    matrix, odd = torch.randn(20, 64), torch.randn(7, 96) * 1e-3
    matrix[3] = 0
    found = {}
    for name, variant in VARIANTS.items():
        found[f"{name}.even"] = quantize(matrix, *variant)
        found[f"{name}.odd"] = quantize(odd, *variant)
    return found


def config() -> dict[str, object]:
    """Return a quantization_config with a group for each kind of weight."""
    groups = {
        name: {
            "targets": ["Linear"],
            "weights": arguments.model_dump(mode="json"),
            "input_activations": None,
            "output_activations": None,
        }
        for name, (_, arguments) in VARIANTS.items()
    }
    return {"quant_method": "compressed-tensors", "config_groups": groups}


if __name__ == "__main__":
    quantization = {
        "quant_method": "compressed-tensors",
        "format": WORDS,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": args(4, "int", "group", False).model_dump(mode="json"),
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": [],
    }
    run(
        HERE,
        layers,
        lambda matrix: quantize(matrix, *VARIANTS["words4_group_zero"]),
        {
            name: (lambda matrix, variant=variant: quantize(matrix, *variant))
            for name, variant in VARIANTS.items()
        },
        ToolFile(quantization, config()),
        multiple=64,
    )
