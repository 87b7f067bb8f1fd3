"""The modules that the loader puts in place of a quantized nn.Linear."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from mezzotint import kernels, layouts
from mezzotint.kernels import AS_STORED, BF16, Backend, Selection, Target, WeightSpec
from mezzotint.tensor import PLAIN, QuantTensor

PREPARED = "prepared_"
"""Begins the names of the buffers that hold what the backend made of the parts."""

_forced: Backend | None = None
_unrounded = False
"""What `use_backend` and `unrounded_inputs` set. Plain globals: torch.compile cannot trace a ContextVar (2.13)."""


class QuantLinear(nn.Module):
    """A linear layer whose weight is a QuantTensor.

    The weight's parts are buffers, in the layout that the chosen backend wants. Moving the layer to another kind of
    device chooses again; casting it leaves the parts as they are, because a float32 scale must stay float32.

    weight        what the layer multiplies by; its bias, if any, becomes an ordinary parameter
    dtype         of the bias, and of the inputs that the layer's owner is to expect (`compute_dtype`)
    activations   "as_stored" or "bf16"
    only          name of the one backend to use, or None for the best
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: QuantTensor,
        dtype: torch.dtype = torch.bfloat16,
        activations: str = AS_STORED,
        only: str | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme = weight.scheme
        self.dynamic_input = weight.dynamic_input
        self.compute_dtype = dtype
        self.activations = activations
        self.only = only
        parts = dict(weight.parts)
        bias = parts.pop("bias", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False))
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.layout = weight.layout
        self._select()

    @property
    def products(self) -> "tuple[QuantLinear, ...]":
        """The products that make up the layer: itself."""
        return (self,)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype for model code that looks at a linear's weight; it has no values to multiply by."""
        return torch.empty(self.out_features, self.in_features, dtype=self.compute_dtype, device="meta")

    @property
    def weight_tensor(self) -> QuantTensor:
        """The weight as a value, without its bias; its parts are this layer's buffers."""
        parts = {name: part for name, part in self._buffers.items() if part is not None}
        ready = {name.removeprefix(PREPARED): parts.pop(name) for name in list(parts) if name.startswith(PREPARED)}
        shape = (self.out_features, self.in_features)
        return QuantTensor(self.scheme, self.layout, shape, parts, self.dynamic_input, ready)

    def dequantize(self) -> Tensor:
        """The real weights that the checkpoint stands for, float32 [out, in]."""
        return self.scheme.dequantize(layouts.convert(self.weight_tensor, PLAIN).parts)

    def forward(self, x: Tensor) -> Tensor:
        own, weight, activations = self.selection.backend, self.weight_tensor, self.activations
        backend = _forced or own
        if _unrounded and self.decoder is not None:
            backend, activations = self.decoder, BF16
        if backend is not own:
            weight = layouts.convert(weight, backend.wants)
            weight = replace(weight, prepared=backend.prepare(weight))
        return backend.linear(x, weight, self.bias, activations)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme.name}, "
            f"backend={self.selection.backend.name}, activations={self.activations}"
        )

    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def _select(self) -> None:
        """Choose the backend for the device that the parts are on, and arrange them as it wants."""
        weight = self.weight_tensor
        spec, target = WeightSpec.of(weight), Target.of(self._device())
        self.selection: Selection = kernels.select(spec, target, self.activations, self.only)
        self.decoder = kernels.decoder(spec, target) if spec.quantizes_input(self.activations) else None
        backend = self.selection.backend
        arranged = layouts.convert(weight, backend.wants)
        self.layout = arranged.layout
        self._buffers = dict(arranged.parts)
        for name, value in backend.prepare(arranged).items():
            self.register_buffer(PREPARED + name, value, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """What `.to()` and its kin call: the bias is moved and cast, the parts are only moved."""
        before, parts = self._device(), dict(self._buffers)
        self._buffers.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        sample = fn(torch.empty(0, device=before, dtype=self.compute_dtype))
        self.compute_dtype, after = sample.dtype, sample.device
        self._buffers.update({name: None if part is None else part.to(after) for name, part in parts.items()})
        if after.type != before.type:
            self._select()
        return self


class SplitLinear(nn.ModuleList):
    """A linear layer stored in several pieces, each with a scale of its own for its part of the input features.

    pieces   weights of equal out_features, side by side along the input; a bias of any of them is added
    """

    def __init__(
        self,
        pieces: Sequence[QuantTensor],
        dtype: torch.dtype = torch.bfloat16,
        activations: str = AS_STORED,
        only: str | None = None,
    ) -> None:
        super().__init__([QuantLinear(piece, dtype, activations, only) for piece in pieces])
        self.out_features = pieces[0].shape[0]
        self.in_features = sum(piece.shape[1] for piece in pieces)

    @property
    def products(self) -> tuple[QuantLinear, ...]:
        """The products that make up the layer, in the order of its input features."""
        return tuple(layer for layer in self if isinstance(layer, QuantLinear))

    def dequantize(self) -> Tensor:
        """The real weights that the checkpoint stands for, float32 [out, in]."""
        return torch.cat([product.dequantize() for product in self.products], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        products = self.products
        columns = torch.split(x, [product.in_features for product in products], dim=-1)
        total: Tensor = products[0](columns[0])
        for product, own in zip(products[1:], columns[1:], strict=True):
            total = total + product(own)
        return total


def linear_of(
    pieces: Sequence[QuantTensor],
    dtype: torch.dtype = torch.bfloat16,
    activations: str = AS_STORED,
    only: str | None = None,
) -> QuantLinear | SplitLinear:
    """The layer that is stored in these pieces, one or several."""
    if len(pieces) == 1:
        return QuantLinear(pieces[0], dtype, activations, only)
    return SplitLinear(pieces, dtype, activations, only)


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


class GroupedLinear(nn.Module):
    """One of a LinearGroup's members. The first one owns the weights."""

    def __init__(self, group: LinearGroup, member: int) -> None:
        super().__init__()
        self.group, self.member = group, member
        self.in_features, self.out_features = group.joined.in_features, group.widths[member]
        if member == 0:
            self.joined = group.joined

    @property
    def weight(self) -> Tensor:
        """Shape and dtype for model code that looks at a linear's weight; it has no values to multiply by."""
        dtype = self.group.joined.compute_dtype
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return self.group.take(x, self.member)


def quant_linears(model: nn.Module) -> dict[str, QuantLinear | SplitLinear]:
    """{module name: layer} of every quantized linear in `model`, one that is stored in pieces counted once."""
    found: dict[str, QuantLinear | SplitLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | SplitLinear) and name.rpartition(".")[0] not in found:
            found[name] = module
    return found


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every quantized linear of the process on this backend while the context is open.

    >>> with use_backend("reference"):
    ...     expected = layer(x)
    """
    global _forced
    before, _forced = _forced, kernels.named(name)
    try:
        yield
    finally:
        _forced = before


@contextmanager
def unrounded_inputs() -> Iterator[None]:
    """Let every quantized linear of the process multiply its input as it is, by its decoded weight, while this is open.

    Where weights have backends of their own for that, a layer takes none: nothing is prepared for a few calls.
    """
    global _unrounded
    before, _unrounded = _unrounded, True
    try:
        yield
    finally:
        _unrounded = before


def overrides() -> tuple[str | None, bool]:
    """What `use_backend` and `unrounded_inputs` have set: all that a layer's product depends on besides its input."""
    return None if _forced is None else _forced.name, _unrounded
