"""Where the layers of a conversion come from: a checkpoint, with missing input scales filled in from another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mezzotint.checkpoint import Checkpoint, Outline
from mezzotint.formats import StoredLinear
from mezzotint.formats.header import TensorInfo
from mezzotint.tensor import QuantTensor

Scales = Sequence[TensorInfo | None]


@dataclass(frozen=True)
class Source:
    """A checkpoint's layers, one at a time.

    scales   {module: a static input scale for each of its pieces, None for a piece that has one or needs none}
    scales_from   where those are from
    """

    checkpoint: Checkpoint
    scales: Mapping[str, Scales] = field(default_factory=dict)
    scales_from: str = ""

    def outline(self, module: str) -> Outline:
        """The module's pieces without values."""
        outline = self.checkpoint.outline(module)
        added = [(_meta(info), info) for info in self.scales.get(module, ()) if info is not None]
        metas = iter([meta for meta, _ in added])
        scales = [None if info is None else next(metas) for info in self.scales.get(module, ())]
        return Outline(_with_scales(outline.pieces, scales), outline.stored + added)

    def read(self, module: str) -> list[QuantTensor]:
        """The module's pieces with their values, checked."""
        scales = [None if info is None else info.read() for info in self.scales.get(module, ())]
        return _with_scales(self.checkpoint.read(module), scales)


def source_of(checkpoint: Checkpoint, other: Checkpoint | None) -> Source:
    """The checkpoint's layers; where one has no static input scale, the one that `other` has for the same module.

    Raises   MissingTensor, ShapeMismatch where the checkpoint is not complete even so
    """
    if other is None:
        return Source(_checked(checkpoint))
    present = _checked(_with_present_scales(checkpoint))
    scales = {module: _scales_for(present, other, module) for module in present.linears}
    found = {module: some for module, some in scales.items() if any(some)}
    return Source(present, found, str(other.header.path))


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    for linear in checkpoint.contents.linears.values():
        linear.check(checkpoint.header)
    return checkpoint


def _with_present_scales(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with static input scales listed only where they are there."""
    linears = {name: _without_absent_scale(checkpoint, linear) for name, linear in checkpoint.contents.linears.items()}
    return replace(checkpoint, contents=replace(checkpoint.contents, linears=linears))


def _without_absent_scale(checkpoint: Checkpoint, linear: StoredLinear) -> StoredLinear:
    static = linear.scheme.static_input
    if static is None or linear.keys.get(static) in checkpoint.header.tensors:
        return linear
    return replace(linear, keys={part: key for part, key in linear.keys.items() if part != static})


def _scales_for(checkpoint: Checkpoint, other: Checkpoint, module: str) -> Scales:
    pieces = [checkpoint.stored(piece.source) for piece in checkpoint.linears[module]]
    others = [other.stored(piece.source) for piece in other.linears.get(module, ())]
    if len(others) != len(pieces):
        return [None] * len(pieces)
    return [_missing_scale(piece, twin, other) for piece, twin in zip(pieces, others, strict=True)]


def _missing_scale(piece: StoredLinear, twin: StoredLinear, other: Checkpoint) -> TensorInfo | None:
    static = piece.scheme.static_input
    if static is None or static in piece.keys or twin.scheme is not piece.scheme or static not in twin.keys:
        return None
    return other.header.tensors.get(twin.keys[static])


def _meta(info: TensorInfo) -> Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def _with_scales(pieces: list[QuantTensor], scales: Sequence[Tensor | None]) -> list[QuantTensor]:
    """The pieces, each with its static input scale added where there is one to add."""
    if not scales:
        return pieces
    return [
        piece if scale is None else replace(piece, parts={**piece.parts, str(piece.scheme.static_input): scale})
        for piece, scale in zip(pieces, scales, strict=True)
    ]
