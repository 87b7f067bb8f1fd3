"""The modules that the loader puts in place of a quantized nn.Linear."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mezzotint import kernels, layouts
from mezzotint.kernels import AS_STORED, BF16, Selection, Target, WeightSpec
from mezzotint.nn.modes import modes
from mezzotint.nn.weight import HasWeight
from mezzotint.tensor import PLAIN, QuantTensor

PREPARED = "prepared_"
"""Begins the names of the buffers that hold what the backend made of the parts."""


class QuantLinear(HasWeight):
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
    def weight_tensor(self) -> QuantTensor:
        """The weight as a value, without its bias; its parts are this layer's buffers."""
        parts = {name: part for name, part in self._buffers.items() if part is not None}
        ready = {name.removeprefix(PREPARED): parts.pop(name) for name in list(parts) if name.startswith(PREPARED)}
        shape = (self.out_features, self.in_features)
        return QuantTensor(self.scheme, self.layout, shape, parts, self.dynamic_input, ready)

    def dequantize(self) -> Tensor:
        """The real weights that the checkpoint stands for, float32 [out, in]."""
        return self.scheme.dequantize(self.plain_weight().parts)

    def real_bias(self) -> Tensor | None:
        """The bias that goes with `dequantize`, float32 [out]."""
        return self.scheme.real_bias(self.plain_weight().parts)

    def plain_weight(self) -> QuantTensor:
        """The weight with its parts in the plain layout, the bias among them."""
        weight = layouts.convert(replace(self.weight_tensor, prepared={}), PLAIN)
        bias = {} if self.bias is None else {"bias": self.bias.detach()}
        return weight.with_parts({**weight.parts, **bias}, PLAIN)

    def forward(self, x: Tensor) -> Tensor:
        own, weight, activations = self.selection.backend, self.weight_tensor, self.activations
        backend = modes.backend or own
        if modes.unrounded and self.decoder is not None:
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

    def _dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        return self.compute_dtype, self._device()

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


class SplitLinear(HasWeight, nn.ModuleList):
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

    def real_bias(self) -> Tensor | None:
        """The bias that goes with `dequantize`, float32 [out]."""
        biases = [bias for product in self.products if (bias := product.real_bias()) is not None]
        return torch.stack(biases).sum(0) if biases else None

    def _dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        return self.products[0]._dtype_and_device()

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


def quant_linears(model: nn.Module) -> dict[str, QuantLinear | SplitLinear]:
    """{module name: layer} of every quantized linear in `model`, one that is stored in pieces counted once."""
    found: dict[str, QuantLinear | SplitLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | SplitLinear) and name.rpartition(".")[0] not in found:
            found[name] = module
    return found
