"""Small transformers for deferred residuals."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor

from support.modulation_models import transformer


def four(name: str) -> Any:
    """A family's tiny transformer with rows of four blocks."""
    return transformer(name, 4)


def cast(given: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    if isinstance(given, dict):
        return {name: cast(value, dtype, device) for name, value in given.items()}
    if isinstance(given, list):
        return [cast(value, dtype, device) for value in given]
    return (
        given.to(device, dtype if given.is_floating_point() else None)
        if isinstance(given, Tensor)
        else given
    )


def with_ip_adapter(model: Any) -> dict[str, Any]:
    """Give FLUX.1's first blocks one, with random weights; returns the argument that it reads."""
    for block in model.transformer_blocks:
        adapter = FluxIPAdapterAttnProcessor(
            model.inner_dim, model.config.joint_attention_dim, num_tokens=(4,), scale=[1.0]
        )
        for parameter in adapter.parameters():
            parameter.data = torch.randn_like(parameter) * 0.1
        block.attn.set_processor(adapter.eval())
    return {
        "joint_attention_kwargs": {
            "ip_hidden_states": [torch.randn(1, 4, model.config.joint_attention_dim)]
        }
    }
