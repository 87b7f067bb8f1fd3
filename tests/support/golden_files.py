"""Golden files: what a checkpoint stands for, held against expected.safetensors."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mezzotint import layouts
from mezzotint.formats import Contents, Header, detect_format, read_header
from mezzotint.tensor import PLAIN, QuantTensor

EXACT = 0.0
FLOAT = 1e-6
"""Relative error that float32 arithmetic in another order may leave."""
FLUX2_DEV = {
    "_class_name": "Flux2Transformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 96,
    "mlp_ratio": 3.0,
    "num_attention_heads": 1,
    "num_layers": 1,
    "num_single_layers": 1,
    "timestep_guidance_channels": 128,
}
KLEIN = FLUX2_DEV | {
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 8, 8, 8],
    "guidance_embeds": False,
    "in_channels": 32,
    "joint_attention_dim": 48,
    "num_attention_heads": 2,
    "num_single_layers": 2,
    "timestep_guidance_channels": 64,
}
"""Configurations of the models of Black Forest Labs' cases, which their files lack."""


def opened(path: Path) -> tuple[Header, Contents]:
    header = read_header(path)
    return header, detect_format(header).format.contents(header)


def plain_parts(path: Path) -> dict[str, QuantTensor]:
    """{module as the file spells it: its weight, row-major}, every one checked first."""
    header, contents = opened(path)
    for linear in contents.linears.values():
        linear.check(header)
    return {
        name: layouts.convert(linear.read(header), PLAIN)
        for name, linear in contents.linears.items()
    }


def expected_modules(expected: dict[str, Tensor]) -> list[str]:
    return [key.removesuffix(".dequantized") for key in expected if key.endswith(".dequantized")]


def assert_stands_for(weights: dict[str, QuantTensor], case: Path, tolerance: float) -> None:
    """Assert the golden case's modules, and each weight's values, bias and sample output."""
    expected = load_file(case)
    assert sorted(weights) == sorted(expected_modules(expected))
    for name, weight in weights.items():
        values = weight.scheme.dequantize(weight.parts)
        rows = expected.get(f"{name}.rows")
        wanted = expected[f"{name}.dequantized"]
        assert_near(values if rows is None else values[rows], wanted, tolerance, name)
        bias = weight.scheme.dequantize_bias(weight.parts)
        if f"{name}.bias" in expected:
            assert bias is not None
            assert torch.equal(bias, expected[f"{name}.bias"]), name
        y = weight.scheme.linear(expected[f"{name}.x"], weight.parts, quantize=False)
        assert_near(y if bias is None else y + bias, expected[f"{name}.y"], 2e-6, name)


def assert_near(values: Tensor, wanted: Tensor, tolerance: float, name: str) -> None:
    """Assert equal bits with EXACT, else |values - wanted| <= tolerance * |wanted| (Frobenius)."""
    if tolerance == EXACT:
        assert torch.equal(values, wanted), name
    else:
        assert torch.linalg.norm(values - wanted) <= tolerance * torch.linalg.norm(wanted), name
