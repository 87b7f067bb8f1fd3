#!/usr/bin/env python3
"""Write the golden files of bitsandbytes beside this script, or `--compare N` random matrices.

A development tool; it needs bitsandbytes 0.50.2, and runs on the CPU with PYTHONPATH=src:tests.
"""

from pathlib import Path

import torch
from bitsandbytes import functional as bnb
from safetensors.torch import save_file
from torch import Tensor

from support.tool_goldens import ToolFile, ToolLayer, run

HERE = Path(__file__).resolve().parent
VARIANTS = {
    f"{kind} {dtype} {block} {'nested' if nested else 'plain'}": (kind, dtype, block, nested)
    for kind in ("nf4", "fp4")
    for dtype in ("float32", "bfloat16", "float16")
    for block in (64, 128, 256)
    for nested in (False, True)
}


def four_bits(matrix: Tensor, kind: str, dtype: str, block: int, nested: bool) -> ToolLayer:
    """Quantize as `Params4bit` does; double quantization is `compress_statistics`."""
    weight = matrix.to(getattr(torch, dtype))
    codes, state = bnb.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type=kind
    )
    stored = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return ToolLayer({"weight": codes} | stored, bnb.dequantize_4bit(codes, state))


def in_dtype(layer: ToolLayer, dtype: torch.dtype) -> ToolLayer:
    """Store the bytes in another dtype, as bnb_4bit_quant_storage does."""
    codes = layer.tensors["weight"].view(-1).view(dtype).view(-1, 1)
    return ToolLayer({**layer.tensors, "weight": codes}, layer.truth)


def eight_bits(matrix: Tensor) -> ToolLayer:
    """Quantize as `Int8Params` does, and decode as diffusers' dequantize does."""
    codes, row_amax, _ = bnb.int8_vectorwise_quant(matrix.half())
    stored = {"weight": codes, "SCB": row_amax, "weight_format": torch.tensor(0).to(torch.uint8)}
    return ToolLayer(stored, bnb.int8_vectorwise_dequant(codes, row_amax))


def write_inputs() -> None:
    """Write an input with outliers of 6 and more, as LLM.int8() quantizes it."""
    torch.manual_seed(1)
    x = torch.randn(5, 24).clamp(-4, 4).half()
    x[1, 3], x[4, 17] = 6.0, -50.0
    codes, row_amax, columns = bnb.int8_vectorwise_quant(x.clone(), threshold=6.0)
    tensors = {"x": x, "codes": codes, "row_amax": row_amax, "outlier_columns": columns}
    save_file(tensors, HERE / "inputs.safetensors")


def layers() -> dict[str, ToolLayer]:
    torch.manual_seed(0)
    wide, narrow, odd = torch.randn(24, 128), torch.randn(33, 48), torch.randn(7, 10) * 1e-4
    zeros = torch.randn(5, 64)
    zeros[2] = 0
    found = {
        f"{name.replace(' ', '_')}.{size}": four_bits(matrix, *variant)
        for name, variant in VARIANTS.items()
        for size, matrix in {"wide": wide, "narrow": narrow, "odd": odd, "zeros": zeros}.items()
        if (variant[2] == 64 or size == "narrow") and (variant[1] == "bfloat16" or size == "odd")
    }
    bf16_storage = in_dtype(four_bits(wide, "nf4", "bfloat16", 64, False), torch.bfloat16)
    return found | {
        "bf16_storage": bf16_storage,
        "int8": eight_bits(wide),
        "int8_odd": eight_bits(torch.randn(7, 11)),
    }


if __name__ == "__main__":
    variants = {
        name: (lambda matrix, variant=variant: four_bits(matrix, *variant))
        for name, variant in VARIANTS.items()
    }
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    write_inputs()
    run(
        HERE,
        layers,
        lambda matrix: four_bits(matrix, "nf4", "bfloat16", 64, True),
        variants | {"int8": eight_bits},
        ToolFile(quantization),
    )
