"""From a file's names to diffusers' names: which rows of which stored tensor make up each tensor of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mezzotint.schemes import Shape


@dataclass(frozen=True)
class Piece:
    """A piece of one stored tensor or layer.

    rows      index [n] into its output features, None for all of them
    columns   how many of its input features there are, None for all of them; what follows is padding
    """

    source: str
    rows: Tensor | None = None
    columns: int | None = None


def as_spelled(shapes: Mapping[str, Shape]) -> "Naming":
    """The naming of a file that already uses diffusers' names."""
    return {name: (Piece(name),) for name in shapes}


Naming = Mapping[str, Sequence[Piece]]
"""{name in the model: its pieces}; several pieces lie side by side along the input features."""
