"""Groups of consecutive columns that share a scale; the last group of a row may be short."""

import torch
from torch import Tensor
from torch.nn import functional as F


def group_count(columns: int, group: int) -> int:
    """Return the number of groups that cover this many columns."""
    return -(-columns // group)


def to_groups(x: Tensor, group: int) -> Tensor:
    """Reshape [..., columns] to [..., groups, group]; a short last group is padded with zeros."""
    columns = x.shape[-1]
    full = group_count(columns, group) * group
    if full != columns:
        x = F.pad(x, (0, full - columns))
    return x.reshape(*x.shape[:-1], -1, group)


def from_groups(x: Tensor, columns: int) -> Tensor:
    """Reshape [..., groups, group] to [..., columns]; the inverse of `to_groups`."""
    return x.flatten(-2)[..., :columns]


def scale_groups(values: Tensor, scale: Tensor, group: int) -> Tensor:
    """Multiply values [..., columns] by the scale [..., groups] of their group."""
    return from_groups(to_groups(values, group) * scale.unsqueeze(-1), values.shape[-1])


def split_groups(values: Tensor, groups: int) -> Tensor:
    """Reshape [..., columns] to [..., groups, columns / groups]."""
    return values.reshape(*values.shape[:-1], groups, -1)


def scale_any_groups(values: Tensor, scale: Tensor) -> Tensor:
    """Multiply values [..., columns] by the scale [..., groups] of their group of equal size."""
    return (split_groups(values, scale.shape[-1]) * scale.float().unsqueeze(-1)).flatten(-2)


def replace_zero_with_one(scale: Tensor) -> Tensor:
    """Replace zero scales with one, so that a group of zeros can be divided by its scale.

    NaN stays, so that a damaged activation shows in the output.
    """
    return torch.where(scale == 0, torch.ones_like(scale), scale)
