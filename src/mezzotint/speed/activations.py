"""GELU's tanh approximation in fewer instructions."""

import torch
from torch import Tensor, nn

TWICE_SQRT_2_OVER_PI = 1.5957691216057308


def tanh_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), which equals x (1 + tanh u) / 2.

    In float32, rounded once. CUDA's tanh is a long function, its exponential is one instruction.
    """
    wide = x.float()
    return (wide * torch.sigmoid(TWICE_SQRT_2_OVER_PI * wide * (1 + 0.044715 * wide * wide))).to(x.dtype)


class TanhGELU(nn.Module):
    """nn.GELU(approximate="tanh")"""

    def forward(self, x: Tensor) -> Tensor:
        return tanh_gelu(x)


def replace_gelu(model: nn.Module) -> None:
    """Compute every tanh approximation of GELU in `model` that way: nn.GELU's, and that of diffusers' own GELU."""
    for name, module in list(model.named_modules()):
        if getattr(module, "approximate", None) != "tanh":
            continue
        if isinstance(module, nn.GELU):
            model.set_submodule(name, TanhGELU())
        else:
            module.gelu = tanh_gelu
