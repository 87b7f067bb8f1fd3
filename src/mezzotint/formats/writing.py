"""How a format is written: from quantized layers under diffusers' names to the tensors of a file.

A `Writer` is the counterpart of a `Format`. It is asked twice for each layer, by the same function: once with parts on
the meta device, which gives the plan (every name, dtype and shape, and every refusal, before a byte is written), and
once with the values. So a writer looks at no numbers but those of the parts that it names in `decisive`, which the plan
reads too; a part that it hands back as the same object is copied from file to file without passing through PyTorch.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from mezzotint.tensor import QuantTensor

Pieces = Sequence[QuantTensor]
"""A module's plain pieces, in the order of its input features; most modules have one."""


@dataclass(frozen=True)
class Refusal:
    """The target has no place for a layer, or for the layers together, and why."""

    reason: str


@dataclass(frozen=True)
class Written:
    """The tensors that a group of layers becomes, {key: tensor}, and what was done to their numbers, if anything."""

    tensors: Mapping[str, Tensor]
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declaration:
    """What the file says of itself: `quantization_config` of config.json, and entries of the safetensors metadata."""

    quantization: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


Held = Sequence[tuple[str, int]]
"""What a stored layer holds, along its output features: pieces of modules, each as (module, number of the piece)."""


@dataclass(frozen=True)
class Model:
    """What a writer may need to know of the model whose layers it is given.

    transformer     name of the class in diffusers
    config          of that class, {} if none was found
    stored_layers   (modules, row_major) -> {layer of a file in which layers are fused: what it holds}
    stored_tensor   (name, row_major) -> the name that such a file gives to an unquantized tensor
    in_nunchaku     module -> whether Nunchaku computes it with quantized weights
    """

    transformer: str
    config: Mapping[str, Any]
    stored_layers: Callable[[Iterable[str], bool], Mapping[str, Held]]
    stored_tensor: Callable[[str, bool], str]
    in_nunchaku: Callable[[str], bool]


class Target(Protocol):
    """One format that can be written.

    name   what `--to` calls it
    file   the output is one safetensors file, not a component folder
    """

    name: str
    title: str
    file: bool

    def writer(self, model: Model) -> "Writer":
        """The writer of this model's layers."""
        ...


class Writer(Protocol):
    """A target, for one model.

    decisive   parts whose numbers, not only dtypes and shapes, decide what is written or refused
    """

    name: str
    title: str
    decisive: Collection[str]

    def groups(self, modules: Collection[str]) -> Iterable[Sequence[str]]:
        """The quantized modules, sorted into those that are stored together."""
        ...

    def layer(self, group: Mapping[str, Pieces]) -> Written | Refusal:
        """The tensors of one group, {module: its pieces}; the same for meta and for real parts."""
        ...

    def plain(self, name: str) -> str:
        """The key under which a tensor that is not quantized is stored."""
        ...

    def declare(self, layers: Mapping[str, Pieces], plain: Collection[str]) -> Declaration | Refusal:
        """What is said of all layers together, given as {module: pieces}, beside the plain tensors' names."""
        ...


Own = TypeVar("Own")


class DiffusersNames:
    """Half of a target and its writer: each module by itself, and every tensor under diffusers' name."""

    decisive: Collection[str] = ()

    def writer(self: Own, _model: Model) -> Own:
        return self

    def groups(self, modules: Collection[str]) -> Iterable[Sequence[str]]:
        return [(module,) for module in modules]

    def plain(self, name: str) -> str:
        return name


def in_pieces(pieces: Pieces, title: str) -> Refusal | None:
    """The refusal of a layer in several pieces, by a target that cannot hold it."""
    if len(pieces) == 1:
        return None
    return Refusal(f"is stored in {len(pieces)} pieces side by side, and {title} holds a layer as one")


def unplaced(piece: QuantTensor, places: Mapping[str, str], title: str) -> Refusal | None:
    """A refusal that names the parts which the target has no place for."""
    extra = sorted(set(piece.parts) - set(places))
    if not extra:
        return None
    return Refusal(f"has {' and '.join(extra)} ({piece.scheme.title}), and {title} has no place for that")


def needs_dynamic_input(piece: QuantTensor) -> bool:
    """Whether the layer's input is rounded only because a scale is computed at each call."""
    return (
        piece.dynamic_input and piece.scheme.static_input is not None and piece.scheme.static_input not in piece.parts
    )


def scalar(part: Tensor) -> Tensor:
    """A single number as a 0-d tensor; the same object if it is one already."""
    return part if part.ndim == 0 else part.reshape(())
