"""Groups of consecutive input columns that share a scale; the last group of a row may be shorter."""

import torch
from torch import Tensor
from torch.nn import functional as F


def group_count(columns: int, group: int) -> int:
    """How many groups cover this many columns."""
    return -(-columns // group)


def to_groups(x: Tensor, group: int) -> Tensor:
    """[..., columns] to [..., groups, group], a short last group filled up with zeros."""
    columns = x.shape[-1]
    full = group_count(columns, group) * group
    if full != columns:
        x = F.pad(x, (0, full - columns))
    return x.reshape(*x.shape[:-1], -1, group)


def from_groups(x: Tensor, columns: int) -> Tensor:
    """[..., groups, group] to [..., columns]; inverse of `grouped`."""
    return x.flatten(-2)[..., :columns]


def scale_groups(values: Tensor, scale: Tensor, group: int) -> Tensor:
    """values [..., columns] times the scale [..., groups] of each one's group."""
    return from_groups(to_groups(values, group) * scale.unsqueeze(-1), values.shape[-1])


def replace_zero_with_one(scale: Tensor) -> Tensor:
    """The scale with zeros replaced by one, so that a group of zeros stays zeros when it is divided by its scale."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
