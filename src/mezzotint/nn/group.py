"""Linear layers on the same input that are multiplied as one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mezzotint.nn.linear import QuantLinear
from mezzotint.nn.weight import HasWeight


class LinearGroup:
    """Several linear layers on the same input, multiplied as one; each member hands out its own columns.

    The member that is called first computes for all, and each of the others takes its share when it is called with
    the same tensor. A member called with another tensor starts anew, so that nothing depends on the order of calls.

    joined   what multiplies, its output features those of the members one after another
    """

    def __init__(self, joined: QuantLinear, widths: Sequence[int]) -> None:
        self.joined = joined
        self.widths = list(widths)
        self.input: Tensor | None = None
        self.product: Tensor | None = None
        self.waiting = [False] * len(widths)

    def take(self, x: Tensor, member: int, count: int = 1) -> Tensor:
        """Columns of the product that belong to a member and those after it: x [..., in] to [..., their widths]."""
        after = member + count
        assert after <= len(self.widths)  # noqa: S101
        if self.input is not x or self.product is None or not all(self.waiting[member:after]):
            self.input, self.product, self.waiting = x, self.joined(x), [True] * len(self.widths)
        first = sum(self.widths[:member])
        share = self.product[..., first : first + sum(self.widths[member:after])]
        self.waiting[member:after] = [False] * count
        if not any(self.waiting):
            self.input = self.product = None
        return share


class GroupedLinear(HasWeight):
    """One of a LinearGroup's members. The first one owns the weights."""

    def __init__(self, group: LinearGroup, member: int) -> None:
        super().__init__()
        self.group, self.member = group, member
        self.in_features, self.out_features = group.joined.in_features, group.widths[member]
        if member == 0:
            self.joined = group.joined

    def dequantize(self) -> Tensor:
        """The real weights of this member, float32 [out, in]."""
        return torch.split(self.group.joined.dequantize(), self.group.widths)[self.member]

    def _dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        return self.group.joined._dtype_and_device()

    def forward(self, x: Tensor) -> Tensor:
        return self.group.take(x, self.member)
