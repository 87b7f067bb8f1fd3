"""A quantized weight as a value: its parts, what they mean, and how their bytes are arranged."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mezzotint.schemes import Scheme


@dataclass(frozen=True)
class Layout:
    """How the bytes of a quantized weight are arranged.

    codes    "low_first": low nibble is the even column, or one code a byte; "high_first": the other way round
    scales   "row_major": [out, in/group]; "tiles_128x4": NVIDIA's blocked order, padded to whole tiles
    """

    codes: str = "low_first"
    scales: str = "row_major"

    def __str__(self) -> str:
        return f"codes {self.codes.replace('_', ' ')}, scales {self.scales.replace('_', ' ')}"


PLAIN = Layout()


@dataclass(frozen=True)
class QuantTensor:
    """A linear layer's weight: `parts` under `scheme`, arranged as `layout`, standing for float32 `shape` (out, in).

    dynamic_input   the layer's input is rounded with a scale computed at each call, where `parts` has no static one
    """

    scheme: Scheme
    layout: Layout
    shape: tuple[int, int]
    parts: Mapping[str, Tensor]
    dynamic_input: bool = False

    @property
    def quantizes_input(self) -> bool:
        """Whether the layer's input is rounded for the product, by a static scale or a dynamic one."""
        return self.scheme.quantizes_input(self.parts, self.dynamic_input)

    def with_parts(self, parts: Mapping[str, Tensor], layout: Layout) -> "QuantTensor":
        return replace(self, parts=dict(parts), layout=layout)

    def rows(self, index: Tensor) -> "QuantTensor":
        """The weight of some output features, in the order of `index` [n]; plain parts only."""
        picked = {
            name: part[index] if self.scheme.part(name).rows and part.shape[:1] == self.shape[:1] else part
            for name, part in self.parts.items()
        }
        return replace(self, parts=picked, shape=(len(index), self.shape[1]))

    def to(self, device: torch.device) -> "QuantTensor":
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})

    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())
