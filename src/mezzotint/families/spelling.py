"""One way of writing a family's tensor names, and how it becomes diffusers' way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from mezzotint.families.naming import Naming, as_spelled
from mezzotint.families.nunchaku_names import nunchaku_naming
from mezzotint.formats.components import PREFIXES
from mezzotint.schemes import Shape

Shapes = Mapping[str, Shape]
"""{tensor name: logical shape} of every plain tensor and of every quantized linear's weight."""


@dataclass(frozen=True)
class Spelling:
    """How a family's tensors may be called in a file; names come without the single file's prefix.

    owns     whether tensors of these names and shapes are the family's, spelled this way
    naming   which stored tensors make up each tensor of the diffusers model
    drops    {end of a tensor's name: reason}, for the tensors that the diffusers model has no place for
    """

    owns: Callable[[Shapes], bool]
    naming: Callable[[Shapes], Naming] = as_spelled
    drops: Mapping[str, str] = field(default_factory=dict)


def holds(*names: str) -> Callable[[Shapes], bool]:
    """Whether all of these tensors are there."""
    return lambda shapes: all(name in shapes for name in names)


def nunchaku(family: str, *names: str) -> Spelling:
    """Nunchaku's own spelling of a family, and row-major SVDQuant's: fused layers that hold all of these tensors."""

    def owns(shapes: Shapes) -> bool:
        naming = nunchaku_naming(family, shapes)
        return all(name in naming for name in names) and any(name not in naming for name in shapes)

    return Spelling(owns, partial(nunchaku_naming, family))


def without_prefix(shapes: Shapes) -> dict[str, str]:
    """{name without the single file's prefix: name}; a file without a prefix keeps its names.

    Where some names have the prefix, the others belong to other components and are left out.
    """
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in shapes)), "")
    return {name.removeprefix(prefix): name for name in shapes if name.startswith(prefix)}
