"""Linear layers that read the same input, computed by one matrix multiplication."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mezzotint.errors import ShapeMismatch
from mezzotint.nn.adapters import LowRankAdapter, adapter_key, check_adapter, remove_adapter
from mezzotint.nn.linear import QuantLinear
from mezzotint.nn.weight import HasWeight
from mezzotint.tensor import concat_rows


class FusedLinear:
    """Several linear layers on the same input, computed together.

    The first slice that is called computes the output, and each slice returns its columns of it. A
    slice that is called with another tensor computes again, so slices may be called in any order.

    linear        the layer that computes; its output features are those of the slices in order
    split_sizes   output features of each slice
    """

    def __init__(self, linear: QuantLinear, split_sizes: Sequence[int]) -> None:
        self.linear = linear
        self.split_sizes = list(split_sizes)
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.pending = [False] * len(self.split_sizes)

    def offset(self, index: int) -> int:
        """Return the first output feature of a slice."""
        return sum(self.split_sizes[:index])

    def slice_output(self, x: Tensor, start: int, count: int = 1) -> Tensor:
        """Return the columns of `count` slices from `start`.

        x         [..., in]
        Returns   [..., sum of the slices' sizes]
        """
        end = start + count
        assert end <= len(self.split_sizes)  # noqa: S101
        if self.input is not x or self.output is None or not all(self.pending[start:end]):
            self.input, self.output = x, self.linear(x)
            self.pending = [True] * len(self.split_sizes)
        columns = self.output[..., self.offset(start) : self.offset(end)]
        self.pending[start:end] = [False] * count
        if not any(self.pending):  # keep no activations in memory until the next step
            self.input = self.output = None
        return columns


class FusedLinearSlice(HasWeight):
    """One layer of a FusedLinear; the first one owns the weights, so that they appear once."""

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self.fused, self.index = fused, index
        self.in_features, self.out_features = fused.linear.in_features, fused.split_sizes[index]
        if index == 0:
            self.linear = fused.linear

    def dequantize(self) -> Tensor:
        """Return the weight of this slice, float32 [out, in], without adapters."""
        return torch.split(self.fused.linear.dequantize(), self.fused.split_sizes)[self.index]

    def set_adapter(self, name: str, down: Tensor, up: Tensor, scale: float = 1.0) -> None:
        """Add scale * (x @ down.T) @ up.T to the output; see QuantLinear.set_adapter."""
        check_adapter(down, up, self.in_features, self.out_features)
        adapter = LowRankAdapter(down, up, scale, self.fused.offset(self.index))
        linear = self.fused.linear
        linear.adapters[adapter_key(name, self.index)] = adapter.to(linear._device())

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter. Raises BadRequest if there is none of this name."""
        remove_adapter(self.fused.linear.adapters, adapter_key(name, self.index), name)

    def _dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        return self.fused.linear._dtype_and_device()

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.slice_output(x, self.index)


def fuse_layers(layers: Sequence[QuantLinear]) -> QuantLinear:
    """Return one layer that computes these layers; adapters and the order of features are kept.

    Raises   ShapeMismatch if backends differ, or values that a fused weight has only once
    """
    first = layers[0]
    if any(layer.selection.backend is not first.selection.backend for layer in layers):
        raise ShapeMismatch("they run on different backends")
    weight = concat_rows([layer.plain_weight() for layer in layers])
    fused = QuantLinear(weight, first.compute_dtype, first.activations, first.backend_name)
    fused.modes = first.modes
    start = 0
    for index, layer in enumerate(layers):
        for key, adapter in layer.adapters.items():
            assert isinstance(adapter, LowRankAdapter)  # noqa: S101
            fused.adapters[f"{key}@{index}"] = adapter.shifted(start)
        start += layer.out_features
    return fused
