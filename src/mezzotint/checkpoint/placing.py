"""A checkpoint held against a model: every place has one tensor of its shape, and every tensor a place.

This is the one rule of what is a checkpoint of a model: `load`, `convert` and `inspect` all ask it here.
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
    listed,
)
from mezzotint.families.building import model_of_shapes
from mezzotint.formats.contents import PARTS
from mezzotint.schemes import Shape
from mezzotint.schemes.scheme import FLOATS

NUMBERS = (*FLOATS, torch.float64)
"""Dtypes of tensors that stand for themselves."""


def account(named: NamedContents, places: Mapping[str, Shape]) -> None:
    """Check that `places`, {tensor of the model: shape}, and the checkpoint's tensors are the same.

    Raises  MissingTensor, UnexpectedTensor, ShapeMismatch, UnknownFormat
    """
    sources = named.sources
    extra = [name for name in sources if name not in places] + named.unplaced
    if missing := [name for name in places if name not in sources]:
        raise _missing(named, missing, extra)
    if extra:
        raise _left_over(named, extra)
    for name, shape in sources.items():
        if shape != places[name]:
            raise ShapeMismatch(f"{named.header.path}: {name} has shape {list(shape)}, expected {list(places[name])}")
    _check_numbers(named)


def _missing(named: NamedContents, names: Sequence[str], extra: Sequence[str]) -> MissingTensor:
    besides = f"; it has no place for {listed(extra)}" if extra else ""
    return MissingTensor(
        f"{named.header.path}: {_some(names)} not there, and the model needs {_them(names)}{besides}",
        "is this a checkpoint of the same model, and complete?",
    )


def _left_over(named: NamedContents, names: Sequence[str]) -> UnexpectedTensor:
    """The error for tensors that the model has no place for: parts of lost layers, or of an unknown variant."""
    message = f"{named.header.path}: {_some(names)} left over; the model has no place for {_them(names)}"
    unknown = _of_no_model(named, names)
    if not unknown or any(name.endswith(PARTS) for name in names):
        return UnexpectedTensor(
            message, "a scale without its quantized weight, or a checkpoint of another model, looks like this."
        )
    title = named.family.title
    return UnknownVariant(
        f"{message}: this is an unknown variant of {title}, and not read",
        f"no {title} model known here has {listed(unknown, 1)}; `mezzotint inspect PATH` shows what is in the file.",
    )


def _of_no_model(named: NamedContents, names: Sequence[str]) -> list[str]:
    """Those of the tensors that no model of the family has, whatever its size."""
    flags = dict.fromkeys(named.flags.values(), True)
    try:
        model = model_of_shapes(named.family, named.sources, flags, str(named.header.path))
    except MezzotintError:
        return []
    known = model.state_dict().keys()
    return [name for name in names if name not in known]


def _check_numbers(named: NamedContents) -> None:
    """Raise UnknownFormat for a tensor of codes that nothing says the meaning of."""
    for name in named.plain:
        info = named.header.tensors[named.plain[name].source]
        if info.dtype in NUMBERS or (named.contents.unscaled and info.dtype is torch.float8_e4m3fn):
            continue
        raise UnknownFormat(
            f"{info.file}: {info.name} is {info.dtype}, and nothing says what its codes stand for",
            "its scale or its note is lost; download the file again.",
        )


def check_flags(named: NamedContents, config: Mapping[str, object]) -> None:
    """Raise UnexpectedTensor where a flag in the file says what the model's configuration does not."""
    for key, entry in named.flags.items():
        if not config.get(entry):
            raise UnexpectedTensor(
                f"{named.header.path}: {key} says that {entry} is true, and the model's configuration does not",
                "name the pipeline that the file was made for; its results differ with and without it.",
            )


def _some(names: Sequence[str]) -> str:
    return f"{listed(names, 4)} {'is' if len(names) == 1 else 'are'}"


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"
