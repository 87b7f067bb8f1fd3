"""Small quantized weights."""

from dataclasses import replace

import torch

from mezzotint.schemes import FP8, NVFP4
from mezzotint.schemes.minifloats import round_e4m3
from mezzotint.tensor import PLAIN, QuantTensor


def fp8_tensor(out: int = 48, in_: int = 64, seed: int = 0) -> QuantTensor:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(seed))
    scale = weight.abs().amax() / 448
    parts = {
        "codes": round_e4m3(weight / scale),
        "weight_scale": scale,
        "input_scale": torch.tensor(4 / 448),
    }
    return QuantTensor(FP8, PLAIN, (out, in_), parts)


def nvfp4_tensor(out: int = 48, in_: int = 64, seed: int = 0) -> QuantTensor:
    random = torch.Generator().manual_seed(seed)
    parts = {
        "codes": torch.randint(0, 256, (out, in_ // 2), generator=random, dtype=torch.uint8),
        "block_scale": torch.rand(out, in_ // 16, generator=random).to(torch.float8_e4m3fn),
        "global_scale": torch.tensor(0.02),
        "input_scale": torch.tensor(4 / 2688),
    }
    return QuantTensor(NVFP4, PLAIN, (out, in_), parts)


def with_bias(tensor: QuantTensor, bias: torch.Tensor) -> QuantTensor:
    return tensor.with_parts(dict(tensor.parts) | {"bias": bias}, tensor.layout)


def dynamic(tensor: QuantTensor) -> QuantTensor:
    """Return the weight without its static input scale, so that input scales are dynamic."""
    parts = {name: part for name, part in tensor.parts.items() if name != "input_scale"}
    return replace(tensor, parts=parts, dynamic_input=True)
