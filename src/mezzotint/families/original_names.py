"""The names of a model's tensors in its makers' files, the reverse of `Family.naming`.

A family lists rules that rename diffusers' tensors; fused layers get one name. Which rows of a
fused tensor each of them has, and in what order, follows from the family's own naming.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError, Unsupported
from mezzotint.families.family import Family
from mezzotint.schemes import Shape

NO_NAMES = "--to mezzotint keeps diffusers' names."


@dataclass(frozen=True)
class Member:
    """One of diffusers' tensors in a tensor of the makers.

    rows   the rows of the makers' tensor that it has, in its order; None for all of them
    """

    name: str
    rows: Tensor | None


def original_layout(
    family: Family, shapes: Mapping[str, Shape]
) -> dict[str, tuple[Shape, Sequence[Member]]]:
    """Return {makers' name: (shape, diffusers' tensors in the order of their first rows)}.

    shapes   {diffusers' name: logical shape} of all tensors of a model
    Raises   Unsupported if the makers' files have no place for a tensor
    """
    fused: dict[str, list[str]] = {}
    for name in shapes:
        fused.setdefault(_original_name(family, name), []).append(name)
    stored = {name: _fused_shape([shapes[one] for one in own]) for name, own in fused.items()}
    try:
        naming = family.naming(stored)
    except MezzotintError as error:
        raise _unsupported(family, error.message) from error
    layout: dict[str, tuple[Shape, Sequence[Member]]] = {}
    for original, names in fused.items():
        members = []
        for name in names:
            (piece,) = naming.get(name, (None,))
            if piece is None or piece.source != original or piece.columns is not None:
                raise _unsupported(family, f"{name} has no place in {original}")
            members.append(Member(name, piece.rows))
        _check_rows(family, original, stored[original], members)
        members.sort(key=lambda member: 0 if member.rows is None else int(member.rows[0]))
        layout[original] = (stored[original], members)
    return layout


def _original_name(family: Family, name: str) -> str:
    for pattern, replacement in family.original_names:
        name = re.sub(pattern, replacement, name)
    return name


def _fused_shape(shapes: Sequence[Shape]) -> Shape:
    return shapes[0] if len(shapes) == 1 else (sum(s[0] for s in shapes), *shapes[0][1:])


def _check_rows(family: Family, name: str, shape: Shape, members: Sequence[Member]) -> None:
    """Raise Unsupported unless the members have each row of the makers' tensor once."""
    if len(members) == 1 and members[0].rows is None:
        return
    rows = [member.rows for member in members if member.rows is not None]
    known = torch.cat(rows).sort().values if len(rows) == len(members) else torch.empty(0)
    if not torch.equal(known, torch.arange(shape[0])):
        raise _unsupported(family, f"the rows of {name} are not all known")


def _unsupported(family: Family, problem: str) -> Unsupported:
    return Unsupported(
        f"the tensors cannot be named as in the makers' files of {family.title}: {problem}",
        NO_NAMES,
    )
