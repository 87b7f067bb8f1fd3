"""Check that a checkpoint has exactly the tensors of a model, in its shapes.

`load`, `convert` and `inspect` all use this check.
"""

from collections.abc import Mapping, Sequence

import torch

from mezzotint.checkpoint.names import NamedContents
from mezzotint.errors import (
    MezzotintError,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
    UnknownFormat,
    UnknownVariant,
    join_names,
)
from mezzotint.families.building import model_of_shapes
from mezzotint.formats.contents import PART_SUFFIXES
from mezzotint.schemes import Shape
from mezzotint.schemes.scheme import FLOAT_DTYPES, FP8_DTYPES

NUMBERS = (*FLOAT_DTYPES, torch.float64)
"""Dtypes whose values need no scale."""


def check_tensors(named: NamedContents, shapes: Mapping[str, Shape]) -> None:
    """Check that the checkpoint has the model's tensors; `shapes` is {model tensor: shape}.

    Raises  MissingTensor, UnexpectedTensor, ShapeMismatch, UnknownFormat
    """
    sources = named.sources
    extra = [name for name in sources if name not in shapes] + named.unknown_tensors
    if missing := [name for name in shapes if name not in sources]:
        raise _missing(named, missing, extra)
    if extra:
        raise _unexpected(named, extra)
    for name, shape in sources.items():
        if shape != shapes[name]:
            raise ShapeMismatch(
                f"{named.header.path}: {name} has shape {list(shape)}, "
                f"expected {list(shapes[name])}"
            )
    _check_numbers(named)


def _missing(named: NamedContents, names: Sequence[str], extra: Sequence[str]) -> MissingTensor:
    unknown = f"; it does not have {join_names(extra)}" if extra else ""
    return MissingTensor(
        f"{named.header.path}: {_some(names)} not there, "
        f"and the model needs {_them(names)}{unknown}",
        "is this a checkpoint of the same model, and complete?",
    )


def _unexpected(named: NamedContents, names: Sequence[str]) -> UnexpectedTensor:
    """Return the error for tensors outside the model: of lost layers, or of an unknown variant."""
    message = (
        f"{named.header.path}: {_some(names)} left over; the model does not have {_them(names)}"
    )
    unknown = _of_no_model(named, names)
    if not unknown or any(name.endswith(PART_SUFFIXES) for name in names):
        return UnexpectedTensor(
            message,
            "typical causes: a scale without its quantized weight, or another model's checkpoint.",
        )
    title = named.family.title
    return UnknownVariant(
        f"{message}: this is an unknown variant of {title}, and not read",
        f"no known {title} model has {join_names(unknown, 1)}; "
        "`mezzotint inspect PATH` shows what the file holds.",
    )


def _of_no_model(named: NamedContents, names: Sequence[str]) -> list[str]:
    """Return the tensors that no model of the family has, of any size."""
    flags = dict.fromkeys(named.flags.values(), True)
    try:
        model = model_of_shapes(named.family, named.sources, flags, str(named.header.path))
    except MezzotintError:
        return []
    known = model.state_dict().keys()
    return [name for name in names if name not in known]


def _check_numbers(named: NamedContents) -> None:
    """Raise UnknownFormat for a plain tensor of codes, which mean nothing without a scale."""
    for name in named.plain:
        info = named.header.tensors[named.plain[name].source]
        if info.name in named.contents.packed or info.dtype in NUMBERS:
            continue
        if named.contents.unscaled and info.dtype in FP8_DTYPES:
            continue
        raise UnknownFormat(
            f"{info.file}: {info.name} is {info.dtype}, and nothing states what its codes mean",
            "its scale or its metadata is lost; download the file again.",
        )


def check_flags(named: NamedContents, config: Mapping[str, object]) -> None:
    """Raise UnexpectedTensor if a flag in the file contradicts the model's configuration."""
    for key, entry in named.flags.items():
        if not config.get(entry):
            raise UnexpectedTensor(
                f"{named.header.path}: {key} says that {entry} is true, "
                "and the model's configuration does not",
                "name the pipeline that the file was made for: the entry changes the results.",
            )


def _some(names: Sequence[str]) -> str:
    return f"{join_names(names, 4)} {'is' if len(names) == 1 else 'are'}"


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"
