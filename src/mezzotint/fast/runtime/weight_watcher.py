"""Detect that a model's weights were replaced or moved."""

from typing import Any

from torch import nn


class WeightWatcher:
    """Addresses and dtypes of a model's weights, and its modules. Looking at them takes about 1 ms.

    In-place changes to weights are not detected.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # References, so that no new module gets the id of one that was freed.
        self.modules: list[nn.Module] = []
        self.last_snapshot: list[Any] | None = None

    def has_changed(self) -> bool:
        """Return whether weights were replaced, moved or cast since the last call."""
        if self.last_snapshot is not None and self._snapshot() == self.last_snapshot:
            return False
        self.modules = list(self.model.modules())
        self.last_snapshot = self._snapshot()
        return True

    def _snapshot(self) -> list[Any]:
        tables = [
            table for module in self.modules for table in (module._parameters, module._buffers)
        ]
        tensors = [tensor for table in tables for tensor in table.values() if tensor is not None]
        children = [id(child) for module in self.modules for child in module._modules.values()]
        addresses = [tensor.data_ptr() for tensor in tensors]
        return addresses + [tensor.dtype for tensor in tensors] + children
