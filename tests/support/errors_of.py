"""Errors between tensors."""

import torch


def relative_error(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    return float(
        torch.linalg.norm((candidate - reference).float()) / torch.linalg.norm(reference.float())
    )
