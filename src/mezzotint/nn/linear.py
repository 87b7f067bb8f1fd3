"""QuantLinear: the module that replaces an nn.Linear whose weight is quantized."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mezzotint import layouts
from mezzotint.kernels import BF16_ACTIVATIONS, QUANTIZED_ACTIVATIONS, Backend, Selection
from mezzotint.nn.adapters import (
    LowRankAdapter,
    adapter_key,
    apply_adapters,
    check_adapter,
    remove_adapter,
)
from mezzotint.nn.modes import ExecutionModes
from mezzotint.nn.selection import LayerBackends, is_storage_device, select_backends
from mezzotint.nn.weight import HasWeight
from mezzotint.tensor import PLAIN, QuantTensor

PREPARED_PREFIX = "prepared_"
"""Prefix of the buffers that hold what the backend prepared."""


class QuantLinear(HasWeight):
    """A linear layer whose weight is a QuantTensor.

    The buffers are the parts of the weight in the layout of one backend, and the tensors that this
    backend prepared from them.

    `.to()` an accelerator arranges and prepares them for its backend, once per kind of device.
    `.to("cpu")` only copies: the buffers stay arranged for the accelerator, and moving back is a
    copy too. No second arrangement is kept, so memory does not double.

    Hooks that assign tensors one by one (accelerate, group offloading) do not call `.to()`. The
    layer then selects a backend when it is called. If necessary, it arranges the parts at each
    call. It keeps the prepared tensors on that device until `.to()` moves the layer.

    Casting does not change the parts, because a float32 scale must stay float32.

    weight         quantized weight; its bias, if any, becomes an ordinary parameter
    dtype          dtype of the bias and of the expected inputs (`compute_dtype`)
    activations    "as_stored" or "bf16"
    backend_name   name of the one backend to use, or None for the best
    """

    bias: Tensor | None
    backends: LayerBackends

    def __init__(
        self,
        weight: QuantTensor,
        dtype: torch.dtype = torch.bfloat16,
        activations: str = QUANTIZED_ACTIVATIONS,
        backend_name: str | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme, self.layout = weight.scheme, weight.layout
        self.dynamic_input = weight.dynamic_input
        self.compute_dtype = dtype
        self.activations, self.backend_name = activations, backend_name
        self.modes = ExecutionModes()
        self.preparations: dict[tuple[str, torch.device], Mapping[str, Tensor]] = {}
        parts = dict(weight.parts)
        bias = parts.pop("bias", None)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        )
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.adapters = nn.ModuleDict()
        self._arrange(self._device())

    @property
    def sublayers(self) -> "tuple[QuantLinear, ...]":
        """Return the layers that make up this one: itself."""
        return (self,)

    @property
    def selection(self) -> Selection:
        """Return the backend for the device that the parts are on, and why not the others."""
        return self._current_backends().selection

    @property
    def bf16_activation_backend(self) -> Backend | None:
        """Return the backend for BF16 activations; None if the layer never quantizes its input."""
        return self._current_backends().bf16_activations

    @property
    def quant_weight(self) -> QuantTensor:
        """Return the weight as a value, without its bias; its parts are this layer's buffers."""
        parts = {name: part for name, part in self._buffers.items() if part is not None}
        prepared = {
            name.removeprefix(PREPARED_PREFIX): parts.pop(name)
            for name in list(parts)
            if name.startswith(PREPARED_PREFIX)
        }
        shape = (self.out_features, self.in_features)
        return QuantTensor(self.scheme, self.layout, shape, parts, self.dynamic_input, prepared)

    @property
    def selected_weight(self) -> QuantTensor:
        """Return the weight as the selected backend takes it."""
        return self.weight_for(self.selection.backend)

    def weight_for(self, backend: Backend) -> QuantTensor:
        """Return the weight as a backend takes it: arranged in its layout, and prepared."""
        if backend.name == self.arranged_for:
            return self.quant_weight
        weight = layouts.convert(replace(self.quant_weight, prepared={}), backend.weight_layout)
        if torch.compiler.is_compiling():  # compiled code can keep nothing from call to call
            return replace(weight, prepared=backend.prepare(weight))
        key = (backend.name, self._device())
        if key not in self.preparations:
            self.preparations[key] = backend.prepare(weight)
        return replace(weight, prepared=self.preparations[key])

    def drop_preparations(self) -> None:
        """Free the tensors that other backends than the buffers' prepared for calls."""
        self.preparations.clear()

    def dequantize(self) -> Tensor:
        """Return the weight that the checkpoint represents, float32 [out, in], without adapters."""
        return self.scheme.dequantize(self.plain_weight().parts)

    def dequantize_bias(self) -> Tensor | None:
        """Return the bias that goes with `dequantize`, float32 [out]."""
        return self.scheme.dequantize_bias(self.plain_weight().parts)

    def plain_weight(self, device: torch.device | None = None) -> QuantTensor:
        """Return the weight with its parts in the plain layout, including the bias.

        device   where to convert it, None for the layer's device; on the meta device, only shapes
                 and dtypes are computed
        """
        device = device or self._device()
        weight = layouts.convert(replace(self.quant_weight, prepared={}).to(device), PLAIN)
        bias = {} if self.bias is None else {"bias": self.bias.detach().to(device)}
        return weight.with_parts({**weight.parts, **bias}, PLAIN)

    def set_adapter(self, name: str, down: Tensor, up: Tensor, scale: float = 1.0) -> None:
        """Add scale * (x @ down.T) @ up.T to the output, in BF16.

        An adapter of the same name is replaced.

        down     [rank, in]
        up       [out, rank]
        Raises   ShapeMismatch, BadRequest if the name has a dot
        """
        check_adapter(down, up, self.in_features, self.out_features)
        self.adapters[adapter_key(name)] = LowRankAdapter(down, up, scale).to(self._device())

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter. Raises BadRequest if there is none of this name."""
        remove_adapter(self.adapters, adapter_key(name), name)

    def forward(self, x: Tensor) -> Tensor:
        backends, activations = self._current_backends(), self.activations
        backend = self.modes.backend or backends.selection.backend
        if self.modes.bf16_activations and backends.bf16_activations is not None:
            backend, activations = backends.bf16_activations, BF16_ACTIVATIONS
        y = backend.linear(x, self.weight_for(backend), self.bias, activations)
        return apply_adapters(self.adapters, x, y)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme.name}, backend={self.selection.backend.name}, "
            f"activations={self.activations}"
        )

    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def _dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        return self.compute_dtype, self._device()

    def _current_backends(self) -> LayerBackends:
        """Return the backends for the parts' device, selected again if hooks moved the parts."""
        if self.backends.device_type != self._device().type:
            self.backends = self._select(self._device())
        return self.backends

    def _select(self, device: torch.device) -> LayerBackends:
        return select_backends(self.quant_weight, device, self.activations, self.backend_name)

    def _arrange(self, device: torch.device) -> None:
        """Select the backends for a device; arrange and prepare the buffers for the best one."""
        self.backends = self._select(device)
        backend = self.backends.selection.backend
        self.arranged_for, self.arranged_on = backend.name, device.type
        weight = replace(self.quant_weight, prepared={})
        arranged = layouts.convert(weight, backend.weight_layout)
        self.layout = arranged.layout
        self._buffers = dict(arranged.parts)
        for name, value in backend.prepare(arranged).items():
            self.register_buffer(PREPARED_PREFIX + name, value, persistent=False)

    def _update_backends(self, device: torch.device) -> None:
        """Select backends after a move to another kind of device, and arrange if necessary."""
        self.preparations.clear()
        if is_storage_device(device) or device.type == self.arranged_on:
            self.backends = self._select(device)
        else:
            self._arrange(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Move and cast the bias, but only move the parts.

        `.to()`, `.cuda()` and `.half()` call this.
        """
        device, buffers = self._device(), dict(self._buffers)
        self._buffers.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        sample = fn(torch.empty(0, device=device, dtype=self.compute_dtype))
        self.compute_dtype = sample.dtype
        self._buffers.update(
            {
                name: None if part is None else part.to(sample.device)
                for name, part in buffers.items()
            }
        )
        if sample.device.type != device.type:
            self._update_backends(sample.device)
        return self
