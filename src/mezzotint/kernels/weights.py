"""Whether a model's weights are those that they were, and where they were."""

from typing import Any

from torch import nn


class Weights:
    """Where a model's weights are in memory, in what dtype, and which modules it has; looked at in about a millisecond.

    Weights that are changed where they are, are not noticed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: list[nn.Module] = []  # held, so that no other one gets the id of one that was there
        self.seen: list[Any] | None = None

    def changed(self) -> bool:
        """Whether one is elsewhere, or another one, since this was asked last."""
        if self.seen is not None and self._look() == self.seen:
            return False
        self.modules = list(self.model.modules())
        self.seen = self._look()
        return True

    def _look(self) -> list[Any]:
        tables = [table for module in self.modules for table in (module._parameters, module._buffers)]
        tensors = [tensor for table in tables for tensor in table.values() if tensor is not None]
        children = [id(child) for module in self.modules for child in module._modules.values()]
        return [tensor.data_ptr() for tensor in tensors] + [tensor.dtype for tensor in tensors] + children
