"""diffusers' own fusing of projections, which would leave a quantized model with layers that have no values."""

from types import MethodType
from typing import Any

from torch import nn

from mezzotint.errors import Unsupported
from mezzotint.nn import quant_linears


def fuse_projections(module: Any) -> Any:
    """Call what diffusers calls `fuse_projections` of an attention. Raises Unsupported if its layers are quantized."""
    _check_unquantized(module, "fuse_projections")
    return type(module).fuse_projections(module)


def fuse_qkv_projections(module: Any) -> Any:
    """Call diffusers' `fuse_qkv_projections` of a model. Raises Unsupported if its layers are quantized."""
    _check_unquantized(module, "fuse_qkv_projections")
    return type(module).fuse_qkv_projections(module)


def guard_fusion(model: nn.Module) -> None:
    """Let a model, and each attention in it, refuse to be fused before anything in it has changed."""
    for module in model.modules():
        for method in (fuse_projections, fuse_qkv_projections):
            if hasattr(type(module), method.__name__):
                setattr(module, method.__name__, MethodType(method, module))


def _check_unquantized(module: nn.Module, name: str) -> None:
    if quant_linears(module):
        raise Unsupported(
            f"{name}: the layers of this {type(module).__name__} are quantized, and diffusers cannot join them",
            "mezzotint.speed_up(model) joins them; or load BF16 weights. Nothing has been changed.",
        )
