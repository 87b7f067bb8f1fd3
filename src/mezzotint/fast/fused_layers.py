"""Linear layers fused with an activation and with the quantization of the next layer's input.

Unfused, the output of a feed-forward layer passes through memory three times: the GEMM writes it,
the activation reads and quantizes it, and the next GEMM reads it. With a static scale, the epilogue
of an FP8 GEMM does all of that. With a scale per row, which depends on the whole row, one kernel
after the GEMM does it, for FP8 and for INT8.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.fast.activations import tanh_gelu
from mezzotint.kernels import QUANTIZED_ACTIVATIONS, Target
from mezzotint.kernels.fp8_gemm import fp8_gemm, quantize_activation
from mezzotint.kernels.fp8_weight import get_fp8_weight, has_fp8_weight, static_activation_scale
from mezzotint.kernels.int8_gemm import int8_gemm
from mezzotint.kernels.int8_weight import get_int8_weight, quantizes_rows_to_int8
from mezzotint.kernels.ops import nvrtc
from mezzotint.kernels.ops.quantize_activation.reference import apply_activation
from mezzotint.nn import QuantLinear, SplitLinear

QuantizedActivation = tuple[Tensor, Tensor]
"""The input of a GEMM: e4m3 or int8 [..., in], and its scale, float32 [1, 1] or [rows, 1]."""


class FusedActivationLinear(nn.Module):
    """A linear layer whose last output features go through an activation and are quantized to FP8.

    layer           the linear layer
    next_layer      the layer that reads the result; it has a static input scale
    activation      "gelu" or "swiglu"
    plain_columns   number of output features, from the first, that stay as they are
    """

    inverse_scale: Tensor
    scale: Tensor

    def __init__(
        self,
        layer: QuantLinear,
        next_layer: QuantLinear,
        activation: str,
        plain_columns: int = 0,
    ) -> None:
        super().__init__()
        self.layer, self.activation, self.plain_columns = layer, activation, plain_columns
        self.next_adapters = next_layer.adapters  # they read the input in BF16
        scale = static_activation_scale(next_layer.quant_weight)
        assert scale is not None  # noqa: S101
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("inverse_scale", 1 / scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor | QuantizedActivation:
        """Return the activated features: x [..., in] to [..., activated]."""
        return self.split(x)[1]

    def split(self, x: Tensor, reserved: int = 0) -> tuple[Tensor, Tensor | QuantizedActivation]:
        """Return x [..., in] as [..., plain_columns] and as [..., reserved + activated].

        reserved   columns left free before the activated ones, if these are in FP8; `write_prefix`
                   fills them
        """
        if len(self.next_adapters) > 0 or not computes_in_fp8(self.layer):
            y = self.layer(x)
            activated = apply_activation(y[..., self.plain_columns :], self.activation)
            return y[..., : self.plain_columns], activated.to(y.dtype)
        rows, input_scale, codes, weight_scale, bias = fp8_gemm_operands(self.layer, x)
        plain, quantized = torch.ops.mezzotint.gemm_act(
            rows,
            codes,
            bias,
            input_scale,
            weight_scale,
            self.inverse_scale,
            self.activation,
            self.plain_columns,
            reserved,
        )
        shape = x.shape[:-1]
        scale = self.scale.reshape(1, 1)
        return plain.reshape(*shape, -1), (quantized.reshape(*shape, -1), scale)

    def write_prefix(
        self, prefix: Tensor, activated: Tensor | QuantizedActivation
    ) -> Tensor | QuantizedActivation:
        """Quantize `prefix` [..., reserved] into the reserved columns of what `split` returned."""
        if isinstance(activated, Tensor):
            return torch.cat((prefix, activated), -1)
        torch.ops.mezzotint.quantize_into(_as_2d(prefix), self.inverse_scale, _as_2d(activated[0]))
        return activated

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "FusedActivationLinear":
        """Move the scales without casting them. `.to()`, `.half()` and others call this."""
        # In BF16 a scale would be off by up to 2^-9, and every quantized number with it.
        scales = self.scale, self.inverse_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale, self.inverse_scale = (scale.to(self.scale.device) for scale in scales)
        return self


class ActivationQuantize(nn.Module):
    """GELU or SwiGLU, quantized with a scale per row to the format of the next layer's input."""

    def __init__(self, activation: str, next_layer: QuantLinear) -> None:
        super().__init__()
        self.activation, self.to_int8 = activation, is_int8_linear(next_layer)
        self.next_layers = (next_layer,)  # in a tuple: it is a submodule of another module

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | QuantizedActivation:
        """Return `prefix` [..., any] and the activation of x [..., out], concatenated."""
        (layer,) = self.next_layers
        # Adapters of the next layer read its input in BF16.
        if len(layer.adapters) > 0 or not layer.modes.layers_as_loaded:
            y = (
                tanh_gelu(x)
                if self.activation == "gelu"
                else apply_activation(x, self.activation).to(x.dtype)
            )
            return y if prefix is None else torch.cat((prefix, y), -1)
        rows = None if prefix is None else _as_2d(prefix)
        if self.to_int8:
            rotation = layer.selected_weight.parts.get("rotation")
            operands = _as_2d(x), rows, rotation, None, self.activation
            codes, scale = torch.ops.mezzotint.quantize_int8(*operands)
        else:
            codes, scale = torch.ops.mezzotint.activation_quantize(_as_2d(x), rows, self.activation)
        return codes.reshape(*x.shape[:-1], -1), scale


class QuantizedInputLinear(nn.Module):
    """A linear layer that also accepts an input that is quantized already."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor | QuantizedActivation) -> Tensor:
        if isinstance(x, Tensor):
            unquantized: Tensor = self.layer(x)
            return unquantized
        x_quantized, scale = x
        weight, bias, dtype = self.layer.selected_weight, self.layer.bias, self.layer.compute_dtype
        rows = _as_2d(x_quantized)
        if x_quantized.dtype == torch.int8:
            y = int8_gemm(rows, scale, *get_int8_weight(weight), bias, dtype)
        else:
            y = fp8_gemm(rows, scale, *get_fp8_weight(weight, bias), dtype)
        return y.reshape(*x_quantized.shape[:-1], -1)


class SplitQuantizedInputLinear(nn.Module):
    """A layer stored in two pieces. Only the input of the second one may be quantized already."""

    def __init__(self, layer: SplitLinear) -> None:
        super().__init__()
        self.first, second = layer.sublayers
        self.second = QuantizedInputLinear(second)

    def forward(self, prefix: Tensor, x: Tensor | QuantizedActivation) -> Tensor:
        """Return [..., out]. Each piece reads its input: `prefix` the first, x the second."""
        output: Tensor = self.first(prefix) + self.second(x)
        return output


class ColumnSlice(nn.Module):
    """Columns of its input. It replaces a layer whose output is computed by a fused one."""

    def __init__(self, start: int, out_features: int) -> None:
        super().__init__()
        self.start, self.out_features = start, out_features

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.start : self.start + self.out_features]


def fp8_gemm_operands(
    layer: QuantLinear, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the operands of an FP8 GEMM: x quantized [rows, in], its scale, codes, scale and bias.

    layer   a layer for which `is_fp8_linear` holds
    x       [..., in]
    """
    # Quantized in plain operations, which Inductor fuses into the norm that produced x.
    weight = layer.selected_weight
    return *quantize_activation(_as_2d(x), static_activation_scale(weight)), *get_fp8_weight(
        weight, layer.bias
    )


def is_fp8_linear(layer: Any) -> bool:
    """Return whether a BF16 layer quantizes its input to FP8 and multiplies it by FP8 weights."""
    return (
        isinstance(layer, QuantLinear)
        and layer.activations == QUANTIZED_ACTIVATIONS
        and layer.compute_dtype == torch.bfloat16
        and has_fp8_weight(layer.quant_weight, layer.selection.backend.name)
    )


def is_int8_linear(layer: Any) -> bool:
    """Return whether a BF16 layer quantizes its input to INT8 with a scale per row.

    A kernel must be able to make that input.
    """
    return (
        isinstance(layer, QuantLinear)
        and layer.activations == QUANTIZED_ACTIVATIONS
        and layer.compute_dtype == torch.bfloat16
        and quantizes_rows_to_int8(layer.quant_weight, layer.selection.backend.name)
        and nvrtc.unavailable_reason(Target.of(next(layer.buffers()).device)) is None
    )


def quantizes_per_row(layer: Any) -> bool:
    """Return whether a layer quantizes its input to FP8 or INT8 with a scale per row."""
    if is_fp8_linear(layer):
        return static_activation_scale(layer.quant_weight) is None
    return is_int8_linear(layer)


def _as_2d(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def computes_in_fp8(layer: Any) -> bool:
    """Return whether a call of this layer is one FP8 GEMM now: no mode or adapter changes it."""
    return is_fp8_linear(layer) and layer.modes.layers_as_loaded and len(layer.adapters) == 0
