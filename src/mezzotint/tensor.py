"""A quantized weight as a value: its parts, what they mean, and how their bytes are arranged."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
    """A linear layer's weight: `parts` under `scheme`, arranged as `layout`, standing for float32 `shape` (out, in)."""

    scheme: Scheme
    layout: Layout
    shape: tuple[int, int]
    parts: Mapping[str, Tensor]

    def with_parts(self, parts: Mapping[str, Tensor], layout: Layout) -> "QuantTensor":
        return replace(self, parts=dict(parts), layout=layout)

    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())
