"""Inputs of a small FLUX.1 transformer."""

import torch
from torch import Tensor


def flux_inputs() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 64, generator=random),
        "encoder_hidden_states": torch.randn(1, 8, 64, generator=random),
        "pooled_projections": torch.randn(1, 32, generator=random),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
