"""Products that end in an activation and in the rounding of the next layer's input, which reads FP8.

In BF16 what a feed-forward layer hands on goes through memory three times: written by the product, read by the
activation, which rounds it, and read again. A product whose result has one scale for all, measured beforehand, does all
of that with its own last instructions. Where each row has a scale of its own, one kernel behind the product does it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.kernels import AS_STORED
from mezzotint.kernels.cuda.product import activated
from mezzotint.kernels.fp8_matrix import fp8_matrix, is_fp8_matrix, static_input_scale
from mezzotint.kernels.products import round_input, rounded_product
from mezzotint.nn import QuantLinear, SplitLinear, overrides
from mezzotint.speed.activations import tanh_gelu

Rounded = tuple[Tensor, Tensor]
"""An input as an FP8 product takes it: e4m3 [..., in], and its scale, float32 [1, 1] or [rows, 1]."""


def activation_round_by_definition(x: Tensor, beside: Tensor | None, activation: str) -> Rounded:
    """activated(x), to the right of `beside`, in e4m3 in units of amax / 448 of each row.

    x, beside    [rows, any]; beside may be None
    activation   "gelu" or "swiglu"; the latter's result is rounded to x's dtype first
    """
    y = activated(x, activation)
    y = y.to(x.dtype).float() if activation == "swiglu" else y
    y = y if beside is None else torch.cat((beside.float(), y), -1)
    return round_input(y, None)


class RoundedProduct(nn.Module):
    """A linear layer whose first columns are handed on as they are and whose others go through an activation and are
    rounded as the next layer reads them.

    following    that layer, which has a static input scale
    activation   "gelu" or "swiglu"
    plain        how many columns are handed on
    """

    inverse: Tensor
    scale: Tensor

    def __init__(self, layer: QuantLinear, following: QuantLinear, activation: str, plain: int = 0) -> None:
        super().__init__()
        self.layer, self.activation, self.plain = layer, activation, plain
        scale = static_input_scale(following.weight_tensor)
        assert scale is not None  # noqa: S101
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("inverse", 1 / scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor | Rounded:
        """x [..., in] to [..., active]."""
        return self.split(x)[1]

    def split(self, x: Tensor, room: int = 0) -> tuple[Tensor, Tensor | Rounded]:
        """x [..., in] to [..., plain] and [..., active], with room for so many columns to the left if in FP8."""
        if not (as_chosen() and in_fp8(self.layer)):
            y = self.layer(x)
            active = activated(y[..., self.plain :], self.activation).to(y.dtype)
            return y[..., : self.plain], active
        rows, input_scale, codes, weight_scale, bias = rounded_operands(self.layer, x)
        plain, rounded = torch.ops.mezzotint.product(
            rows, codes, bias, input_scale, weight_scale, self.inverse, self.activation, self.plain, room
        )
        shape = x.shape[:-1]
        return plain.reshape(*shape, -1), (rounded.reshape(*shape, -1), self.scale.reshape(1, 1))

    def beside(self, left: Tensor, active: Tensor | Rounded) -> Tensor | Rounded:
        """`left` [..., room] rounded too, and put in its place."""
        if isinstance(active, Tensor):
            return torch.cat((left, active), -1)
        torch.ops.mezzotint.round_into(_rows(left), self.inverse, _rows(active[0]))
        return active

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoundedProduct":
        """What `.to()` and its kin call: scales are moved, and stay float32."""
        before = self.scale, self.inverse
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale, self.inverse = (scale.to(self.scale.device) for scale in before)
        return self


class ActivationRounding(nn.Module):
    """GELU or SwiGLU behind a product, rounded to FP8 with a scale for each row."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor | Rounded:
        """x [..., out] to [..., active], and `beside` [..., any] to its left."""
        if not as_chosen():
            y = tanh_gelu(x) if self.activation == "gelu" else activated(x, self.activation).to(x.dtype)
            return y if beside is None else torch.cat((beside, y), -1)
        left = None if beside is None else _rows(beside)
        codes, scale = torch.ops.mezzotint.activation_round(_rows(x), left, self.activation)
        return codes.reshape(*x.shape[:-1], -1), scale


class RoundedLinear(nn.Module):
    """The layer behind: an input in FP8 is multiplied as it is, any other by the layer itself."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor | Rounded) -> Tensor:
        if isinstance(x, Tensor):
            own: Tensor = self.layer(x)
            return own
        rounded, scale = x
        codes, weight_scale, bias = fp8_matrix(self.layer.weight_tensor, self.layer.bias)
        y = rounded_product(_rows(rounded), scale, codes, weight_scale, bias, self.layer.compute_dtype)
        return y.reshape(*rounded.shape[:-1], -1)


class RoundedPieces(nn.Module):
    """The layer behind, where it is stored in two pieces: the first is given an input of its own, to round itself."""

    def __init__(self, layer: SplitLinear) -> None:
        super().__init__()
        self.first, second = layer.products
        self.second = RoundedLinear(second)

    def forward(self, left: Tensor, x: Tensor | Rounded) -> Tensor:
        """left [..., in of the first] and x [..., in of the second] to [..., out]."""
        product: Tensor = self.first(left) + self.second(x)
        return product


class Columns(nn.Module):
    """Some columns of its input, in the place of a layer whose product has been computed with others."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.first, self.out_features = first, count

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.first : self.first + self.out_features]


def rounded_operands(layer: QuantLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x [..., in] in FP8 as rows, its scale, and the codes, scale and bias of a layer that is `in_fp8`."""
    weight = layer.weight_tensor
    return *round_input(_rows(x), static_input_scale(weight)), *fp8_matrix(weight, layer.bias)


def in_fp8(layer: Any) -> bool:
    """Whether a layer, in BF16, rounds its input to FP8 and multiplies by an FP8 matrix."""
    return (
        isinstance(layer, QuantLinear)
        and layer.activations == AS_STORED
        and layer.compute_dtype == torch.bfloat16
        and is_fp8_matrix(layer.weight_tensor, layer.selection.backend.name)
    )


def rounds_by_row(layer: QuantLinear) -> bool:
    """Whether each row of its input is rounded to FP8 with a scale of its own."""
    return in_fp8(layer) and static_input_scale(layer.weight_tensor) is None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def as_chosen() -> bool:
    """Whether neither another backend nor exact inputs are asked for, which are the layers' own affair."""
    return overrides() == (None, False)
