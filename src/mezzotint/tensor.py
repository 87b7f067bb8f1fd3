"""A quantized weight as a value: its parts, what they mean, and how their bytes are arranged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mezzotint.errors import ShapeMismatch
from mezzotint.schemes import Scheme


@dataclass(frozen=True)
class Layout:
    """How the bytes of a quantized weight are arranged.

    codes      "low_first": low nibble is the even column, or one code a byte; "high_first": the other way round;
               "low_first_int8": low nibble first in signed bytes; "fragments": Nunchaku's; "awq_words": AWQ's int32
    scales     "row_major": [out, in/group]; "by_group": [in/group, out]; "tiles_128x4": NVIDIA's blocked order, padded
               to whole tiles; "fragments", "micro_fragments": Nunchaku's of 16 and of 8 bits; "awq_groups": [in/group,
               out], padded
    vectors    "plain", or "fragments": bias, smooth and channel_scale in Nunchaku's order
    low_rank   "plain": proj_down [rank, in]; "down_by_column": proj_down [in, rank]; "fragments": Nunchaku's
    """

    codes: str = "low_first"
    scales: str = "row_major"
    vectors: str = "plain"
    low_rank: str = "plain"

    def __str__(self) -> str:
        said = [f"codes {self.codes}", f"scales {self.scales}"]
        said += [f"vectors {self.vectors}"] if self.vectors != "plain" else []
        said += [f"low rank {self.low_rank}"] if self.low_rank != "plain" else []
        return ", ".join(said).replace("_", " ")


PLAIN = Layout()


@dataclass(frozen=True)
class QuantTensor:
    """A linear layer's weight: `parts` under `scheme`, arranged as `layout`, standing for float32 `shape` (out, in).

    dynamic_input   the layer's input is rounded with a scale computed at each call, where `parts` has no static one
    prepared        what the backend that multiplies by it has worked out of the parts, by `Backend.prepare`
    """

    scheme: Scheme
    layout: Layout
    shape: tuple[int, int]
    parts: Mapping[str, Tensor]
    dynamic_input: bool = False
    prepared: Mapping[str, Tensor] = field(default_factory=dict)

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

    def columns(self, count: int) -> "QuantTensor":
        """The weight of the first `count` input features; plain parts only.

        Raises   ShapeMismatch if the cut goes through a group that shares a scale
        """
        own = self.shape[1]
        if count % self.scheme.group:
            raise ShapeMismatch(
                f"{self.scheme.title} weight of {own} input features cannot be cut to {count}: "
                f"that is no multiple of {self.scheme.group}"
            )
        cut = {
            name: part[..., : part.shape[-1] * count // own].contiguous() if self.scheme.part(name).columns else part
            for name, part in self.parts.items()
        }
        return replace(self, parts=cut, shape=(self.shape[0], count))

    def to(self, device: torch.device) -> "QuantTensor":
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})

    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def join_rows(tensors: Sequence[QuantTensor]) -> QuantTensor:
    """One weight of several that multiply the same input, their output features one after another; plain parts only.

    A scale that each has of its own for all its rows is kept for each row.

    Raises   ShapeMismatch where they differ in what a joined weight has only once (smooth, proj_down, input_scale)
    """
    first = tensors[0]
    if any(tensor.parts.keys() != first.parts.keys() or tensor.scheme is not first.scheme for tensor in tensors):
        raise ShapeMismatch("weights cannot be joined by rows: they do not have the same parts")
    parts = {name: _joined(name, tensors) for name in first.parts}
    return replace(first, parts=parts, shape=(sum(tensor.shape[0] for tensor in tensors), first.shape[1]))


def _joined(name: str, tensors: Sequence[QuantTensor]) -> Tensor:
    first, own = tensors[0], [tensor.parts[name] for tensor in tensors]
    by_row = first.scheme.part(name).rows
    if by_row and all(part.shape[:1] == tensor.shape[:1] for part, tensor in zip(own, tensors, strict=True)):
        return torch.cat(own)
    if all(torch.equal(part, own[0]) for part in own):
        return own[0]
    if by_row:
        rows = [tensor.shape[0] for tensor in tensors]
        return torch.cat([part.reshape(-1).expand(count) for part, count in zip(own, rows, strict=True)])
    raise ShapeMismatch(f"weights cannot be joined by rows: each has a {name} of its own")


def real_weight(pieces: Sequence[QuantTensor]) -> Tensor:
    """What a layer's plain pieces stand for, side by side along its input features: float32 [out, in]."""
    return torch.cat([piece.scheme.dequantize(piece.parts) for piece in pieces], dim=1)


def unquantized(dtype: torch.dtype) -> torch.dtype:
    """In what a tensor of no quantized layer is held: its own dtype, or BF16 for e4m3, all of whose numbers it has."""
    return torch.bfloat16 if dtype is torch.float8_e4m3fn else dtype
