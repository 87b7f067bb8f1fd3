"""From a file's names to diffusers' names: which stored rows make up each tensor of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mezzotint.schemes import Shape


@dataclass(frozen=True)
class Piece:
    """A piece of one stored tensor or layer.

    rows      index [n] into its output features; None for all of them
    columns   number of leading input features; None for all. The rest is padding
    """

    source: str
    rows: Tensor | None = None
    columns: int | None = None


Naming = Mapping[str, Sequence[Piece]]
"""{tensor of the model: its pieces}; several pieces are concatenated along the input features."""


def identity_naming(shapes: Mapping[str, Shape]) -> Naming:
    """Return the naming of a file that already uses diffusers' names."""
    return {name: (Piece(name),) for name in shapes}
