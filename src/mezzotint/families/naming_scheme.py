"""One way to name a family's tensors, and how its names become diffusers' names."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from mezzotint.families.naming import Naming, identity_naming
from mezzotint.families.nunchaku_names import NunchakuNames
from mezzotint.schemes import Shape

Shapes = Mapping[str, Shape]
"""{tensor name: logical shape} of every plain tensor and of every quantized linear's weight."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
"""What single files, and state dicts of whole pipelines, put before the transformer's names."""


@dataclass(frozen=True)
class NamingScheme:
    """How a file may name a family's tensors; names come without the single file's prefix.

    owns              shapes -> whether a file with these tensors uses this scheme
    naming            shapes -> the stored pieces of each tensor of the diffusers model
    unused_suffixes   {suffix of a tensor's name: why the diffusers model does not have it}
    """

    owns: Callable[[Shapes], bool]
    naming: Callable[[Shapes], Naming] = identity_naming
    unused_suffixes: Mapping[str, str] = field(default_factory=dict)


def has_tensors(*names: str) -> Callable[[Shapes], bool]:
    """Return a test whether all of these tensors are present."""
    return lambda shapes: all(name in shapes for name in names)


def nunchaku_naming_scheme(nunchaku: NunchakuNames, *names: str) -> NamingScheme:
    """Return the scheme of Nunchaku's and row-major SVDQuant files.

    names   tensors of the diffusers model that a file of the family must give
    """

    def owns(shapes: Shapes) -> bool:
        naming = nunchaku.naming(shapes)
        return all(name in naming for name in names) and any(name not in naming for name in shapes)

    return NamingScheme(owns, nunchaku.naming)


def transformer_prefix(names: Iterable[str]) -> str:
    """Return the first of PREFIXES that any of the names has, or an empty string."""
    names = tuple(names)
    return next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")


def strip_prefix(shapes: Shapes) -> dict[str, str]:
    """Return {name without the single file's prefix: name}; a file without one keeps its names.

    If some names have the prefix, the others belong to other components and are left out.
    """
    prefix = transformer_prefix(shapes)
    return {name.removeprefix(prefix): name for name in shapes if name.startswith(prefix)}
