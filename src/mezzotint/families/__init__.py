"""Model families, one file each."""

import sys
from collections.abc import Mapping
from functools import cache

from mezzotint.discover import collect
from mezzotint.errors import UnknownFormat
from mezzotint.families.family import Family, Sampling
from mezzotint.formats import Header

__all__ = ["Family", "Sampling", "families", "family_of"]


@cache
def families() -> Mapping[str, Family]:
    """{name: family}, discovered from the modules of this package."""
    return collect(sys.modules[__name__], "FAMILY")


def family_of(header: Header) -> Family:
    """The family whose tensors these are; UnknownFormat if it is none, or more than one."""
    found = [family for family in families().values() if family.owns(header.tensors)]
    if len(found) == 1:
        return found[0]
    raise UnknownFormat(
        f"{header.path}: its tensors are those of no model family known here ({', '.join(families())})",
        f"its first tensors are {', '.join(list(header.tensors)[:3])}.",
    )
