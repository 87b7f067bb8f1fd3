"""How a format is written: from quantized layers under diffusers' names to the tensors of a file.

A `Writer` is the counterpart of a `Format`. It is asked twice for each layer, by the same function: once with parts on
the meta device, which gives the plan (every name, dtype and shape, and every refusal, before a byte is written), and
once with the values. A writer reads the values of the parts in `needs_values` only, which the plan reads too. A part
that it returns as the same object is copied from file to file without passing through PyTorch.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from mezzotint.families import Family
from mezzotint.tensor import QuantTensor

Pieces = Sequence[QuantTensor]
"""A module's plain pieces, in the order of its input features; most modules have one."""


@dataclass(frozen=True)
class CannotStore:
    """The target has no place for a layer, or for the layers together, and why."""

    reason: str


@dataclass(frozen=True)
class StoredTensors:
    """The tensors that a group of layers becomes, {key: tensor}, and what was done to their numbers, if anything."""

    tensors: Mapping[str, Tensor]
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declaration:
    """What the file says of itself: `quantization_config` of config.json, and entries of the safetensors metadata."""

    quantization: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """The model whose layers a writer gets.

    family   the model's family, with the names of fused layers in Nunchaku's files
    config   configuration of its transformer class, {} if none was found
    """

    family: Family
    config: Mapping[str, Any]


class Target(Protocol):
    """One format that can be written.

    name   what `--to` calls it
    file   the output is one file, not a component folder
    suffix how its name ends
    """

    name: str
    title: str
    file: bool
    suffix: str

    def writer(self, model: ModelInfo) -> "Writer":
        """The writer of this model's layers."""
        ...


class Writer(Protocol):
    """A target, for one model.

    needs_values   parts whose numbers, not only dtypes and shapes, decide what is written or refused
    """

    name: str
    title: str
    needs_values: Collection[str]

    def groups(self, modules: Collection[str]) -> Iterable[Sequence[str]]:
        """The quantized modules, sorted into those that are stored together."""
        ...

    def layer(self, group: Mapping[str, Pieces]) -> StoredTensors | CannotStore:
        """The tensors of one group, {module: its pieces}; the same for meta and for real parts."""
        ...

    def plain(self, name: str) -> str:
        """The key under which a tensor that is not quantized is stored."""
        ...

    def declare(
        self, layers: Mapping[str, Pieces], plain: Collection[str]
    ) -> Declaration | CannotStore:
        """What is said of all layers together, given as {module: pieces}, beside the plain tensors' names."""
        ...


Self = TypeVar("Self")


class DiffusersLayerWriter:
    """Half of a target and its writer: each module by itself, and every tensor under diffusers' name."""

    needs_values: Collection[str] = ()
    suffix = ".safetensors"

    def writer(self: Self, _model: ModelInfo) -> Self:
        return self

    def groups(self, modules: Collection[str]) -> Iterable[Sequence[str]]:
        return [(module,) for module in modules]

    def plain(self, name: str) -> str:
        return name


def refuse_pieces(pieces: Pieces, title: str) -> CannotStore | None:
    """The refusal of a layer in several pieces, by a target that cannot hold it."""
    if len(pieces) == 1:
        return None
    return CannotStore(
        f"is stored in {len(pieces)} pieces side by side, and {title} holds a layer as one"
    )


def refuse_extra_parts(
    piece: QuantTensor, places: Mapping[str, str], title: str
) -> CannotStore | None:
    """A refusal that names the parts which the target has no place for."""
    extra = sorted(set(piece.parts) - set(places))
    if not extra:
        return None
    return CannotStore(
        f"has {' and '.join(extra)} ({piece.scheme.title}), and {title} has no place for that"
    )


def needs_dynamic_input(piece: QuantTensor) -> bool:
    """Whether the layer's input is rounded only because a scale is computed at each call."""
    return (
        piece.dynamic_input
        and piece.scheme.static_scale_part is not None
        and piece.scheme.static_scale_part not in piece.parts
    )


def scalar(part: Tensor) -> Tensor:
    """A single number as a 0-d tensor; the same object if it is one already."""
    return part if part.ndim == 0 else part.reshape(())
