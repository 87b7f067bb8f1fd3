"""Model families, one file each."""

import sys
from collections.abc import Mapping
from functools import cache

from mezzotint.discover import collect
from mezzotint.errors import UnknownFormat
from mezzotint.families.family import Family, Sampling
from mezzotint.schemes import Shape

__all__ = ["Family", "Sampling", "families", "family_of"]


@cache
def families() -> Mapping[str, Family]:
    """{name: family}, discovered from the modules of this package."""
    return collect(sys.modules[__name__], "FAMILY")


def family_of(shapes: Mapping[str, Shape], where: str) -> Family:
    """The family whose tensors these are, {name: logical shape}; UnknownFormat if it is none, or more than one."""
    found = [family for family in families().values() if family.owns(shapes)]
    if len(found) == 1:
        return found[0]
    raise UnknownFormat(
        f"{where}: its tensors are those of no model family known here ({', '.join(families())})",
        f"its first tensors are {', '.join(list(shapes)[:3])}.",
    )
