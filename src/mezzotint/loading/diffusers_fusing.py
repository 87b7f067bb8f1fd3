"""Forbid diffusers' fusing of projections in quantized models, which would lose their weights."""

from types import MethodType
from typing import Any

from torch import nn

from mezzotint.errors import Unsupported
from mezzotint.nn import quant_linears


def fuse_projections(module: Any) -> Any:
    """Call an attention's `fuse_projections`. Raises Unsupported if its layers are quantized."""
    _check_unquantized(module, "fuse_projections")
    return type(module).fuse_projections(module)


def fuse_qkv_projections(module: Any) -> Any:
    """Call a model's `fuse_qkv_projections`. Raises Unsupported if its layers are quantized."""
    _check_unquantized(module, "fuse_qkv_projections")
    return type(module).fuse_qkv_projections(module)


def forbid_fusing(model: nn.Module) -> None:
    """Make the fusing methods of a model and its attentions raise Unsupported before any change."""
    for module in model.modules():
        for method in (fuse_projections, fuse_qkv_projections):
            if hasattr(type(module), method.__name__):
                setattr(module, method.__name__, MethodType(method, module))


def _check_unquantized(module: nn.Module, name: str) -> None:
    if quant_linears(module):
        raise Unsupported(
            f"{name}: diffusers cannot fuse the quantized layers of this {type(module).__name__}",
            "use mezzotint.speed_up(model), or load BF16 weights. Nothing has been changed.",
        )
