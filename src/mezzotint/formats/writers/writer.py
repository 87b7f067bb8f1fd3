"""The interface of writers: quantized layers under diffusers' names in, tensors of a file out.

A `Writer` is the counterpart of a `Format`. Conversion calls `Writer.layer` twice per layer:

1. With parts on the meta device, to plan. The plan has every name, dtype and shape, and every
   reason to refuse, before a byte is written.
2. With the values, to write.

Writers read only the values of the parts in `needs_values`, which the plan has as well. A part that
is returned as the same object is copied from file to file, without passing through PyTorch.
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
    """The target cannot store a layer, or all layers together; `reason` says why.

    The reason follows the names of the layers, such as "is INT8, and ComfyUI stores FP8".
    """

    reason: str


@dataclass(frozen=True)
class StoredTensors:
    """The tensors that store a group of layers.

    tensors      {key: tensor}
    transforms   how values or activations differ from the source, empty if they do not
    """

    tensors: Mapping[str, Tensor]
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declaration:
    """What a file declares about its layers.

    quantization   `quantization_config` of config.json
    metadata       entries of the safetensors metadata
    """

    quantization: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """The model that a writer stores.

    family   the model's family, which has the names of fused layers in Nunchaku's files
    config   configuration of the transformer, {} if none was found
    """

    family: Family
    config: Mapping[str, Any]


class Target(Protocol):
    """A format that can be written.

    name     value of `--to`
    file     the output is one file, not a component folder
    suffix   ending of its name
    """

    name: str
    title: str
    file: bool
    suffix: str

    def writer(self, model: ModelInfo) -> "Writer":
        """Return the writer for a model."""
        ...


class Writer(Protocol):
    """A target, for one model.

    needs_values   parts whose values decide what is written or refused
    constants      endings of names of tensors that depend on no values: the plan keeps them
    """

    name: str
    title: str
    needs_values: Collection[str]
    constants: tuple[str, ...]

    def groups(self, modules: Collection[str]) -> Iterable[Sequence[str]]:
        """Group the quantized modules that the file stores together."""
        ...

    def layer(self, group: Mapping[str, Pieces]) -> StoredTensors | CannotStore:
        """Return the tensors of a group {module: its pieces}, with values or on the meta device."""
        ...

    def plain(self, name: str) -> str:
        """Return the key of an unquantized tensor."""
        ...

    def declare(
        self, layers: Mapping[str, Pieces], plain: Collection[str]
    ) -> Declaration | CannotStore:
        """Declare all layers together.

        layers   {quantized module: its pieces}
        plain    names of the unquantized tensors
        """
        ...


Self = TypeVar("Self")


class DiffusersLayerWriter:
    """Base of targets that store each module separately, and all tensors by diffusers' names."""

    needs_values: Collection[str] = ()
    constants: tuple[str, ...] = ()
    suffix = ".safetensors"

    def writer(self: Self, _model: ModelInfo) -> Self:
        return self

    def groups(self, modules: Collection[str]) -> Iterable[Sequence[str]]:
        return [(module,) for module in modules]

    def plain(self, name: str) -> str:
        return name


def check_single_piece(pieces: Pieces, title: str) -> CannotStore | None:
    """Return CannotStore if a layer has several pieces, for targets that store one."""
    if len(pieces) == 1:
        return None
    return CannotStore(
        f"has {len(pieces)} pieces along its input features, and {title} stores a layer in one"
    )


ROUNDED_RECIPROCAL = "the scale of a matrix is the reciprocal of a divisor, rounded to float32"


def without_divisor(piece: QuantTensor) -> tuple[QuantTensor, tuple[str, ...]]:
    """Return a layer without `global_divisor`, and what that changes: its scale is rounded."""
    if "global_divisor" not in piece.parts:
        return piece, ()
    parts = {name: value for name, value in piece.parts.items() if name != "global_divisor"}
    return piece.with_parts(parts, piece.layout), (ROUNDED_RECIPROCAL,)


def check_parts(piece: QuantTensor, known: Collection[str], title: str) -> CannotStore | None:
    """Return CannotStore if a layer has parts other than the `known` ones."""
    extra = sorted(piece.parts.keys() - set(known))
    if not extra:
        return None
    return CannotStore(
        f"has {' and '.join(extra)} ({piece.scheme.title}), which {title} cannot store"
    )


def needs_dynamic_input(piece: QuantTensor) -> bool:
    """Return whether a layer lacks a static input scale and computes one at each call."""
    return (
        piece.dynamic_input
        and piece.scheme.static_scale_part is not None
        and piece.scheme.static_scale_part not in piece.parts
    )


def scalar(part: Tensor) -> Tensor:
    """Return a single number as a 0-d tensor; a 0-d tensor is returned as the same object."""
    return part if part.ndim == 0 else part.reshape(())
