"""Linear layers that a checkpoint stores in several pieces."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mezzotint.kernels import QUANTIZED_ACTIVATIONS
from mezzotint.nn.adapters import check_adapter
from mezzotint.nn.linear import QuantLinear
from mezzotint.nn.weight import HasWeight
from mezzotint.tensor import QuantTensor


class SplitLinear(HasWeight, nn.ModuleList):
    """A linear layer stored in several pieces, each with scales for its part of the input features.

    pieces         weights of equal out_features, in the order of the input features; biases add up
    dtype          dtype of the biases and of the expected inputs
    activations    "as_stored" or "bf16"
    backend_name   name of the one backend to use, or None for the best
    """

    def __init__(
        self,
        pieces: Sequence[QuantTensor],
        dtype: torch.dtype = torch.bfloat16,
        activations: str = QUANTIZED_ACTIVATIONS,
        backend_name: str | None = None,
    ) -> None:
        super().__init__([QuantLinear(piece, dtype, activations, backend_name) for piece in pieces])
        self.out_features = pieces[0].shape[0]
        self.in_features = sum(piece.shape[1] for piece in pieces)

    @property
    def sublayers(self) -> tuple[QuantLinear, ...]:
        """Return the layers of the pieces, in the order of their input features."""
        return tuple(layer for layer in self if isinstance(layer, QuantLinear))

    def dequantize(self) -> Tensor:
        """Return the weight that the checkpoint represents, float32 [out, in], without adapters."""
        return torch.cat([layer.dequantize() for layer in self.sublayers], dim=1)

    def dequantize_bias(self) -> Tensor | None:
        """Return the bias that goes with `dequantize`, float32 [out]."""
        found = [layer.dequantize_bias() for layer in self.sublayers]
        biases = [bias for bias in found if bias is not None]
        return torch.stack(biases).sum(0) if biases else None

    def set_adapter(self, name: str, down: Tensor, up: Tensor, scale: float = 1.0) -> None:
        """Add scale * (x @ down.T) @ up.T to the output; see QuantLinear.set_adapter."""
        check_adapter(down, up, self.in_features, self.out_features)
        parts = torch.split(down, [layer.in_features for layer in self.sublayers], dim=1)
        for layer, part in zip(self.sublayers, parts, strict=True):
            layer.set_adapter(name, part, up, scale)

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter. Raises BadRequest if there is none of this name."""
        for layer in self.sublayers:
            layer.remove_adapter(name)

    def _dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        return self.sublayers[0]._dtype_and_device()

    def forward(self, x: Tensor) -> Tensor:
        layers = self.sublayers
        columns = torch.split(x, [layer.in_features for layer in layers], dim=-1)
        total: Tensor = layers[0](columns[0])
        for layer, part in zip(layers[1:], columns[1:], strict=True):
            total = total + layer(part)
        return total


def make_linear(
    pieces: Sequence[QuantTensor],
    dtype: torch.dtype = torch.bfloat16,
    activations: str = QUANTIZED_ACTIVATIONS,
    backend_name: str | None = None,
) -> QuantLinear | SplitLinear:
    """Return a QuantLinear for one piece, or a SplitLinear for several."""
    if len(pieces) == 1:
        return QuantLinear(pieces[0], dtype, activations, backend_name)
    return SplitLinear(pieces, dtype, activations, backend_name)


def quant_linears(model: nn.Module) -> dict[str, QuantLinear | SplitLinear]:
    """Return {module name: layer} of all quantized linears; pieces count as one layer."""
    found: dict[str, QuantLinear | SplitLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | SplitLinear) and name.rpartition(".")[0] not in found:
            found[name] = module
    return found
