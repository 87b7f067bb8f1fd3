"""Rename tensors for checkpoints that differ from known ones in tensor names alone."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mezzotint.containers import TensorInfo
from mezzotint.errors import BadRequest
from mezzotint.formats.components import with_renamed_layers
from mezzotint.formats.header import Header

Renames = Mapping[str, str]
"""{regular expression: replacement} for `re.sub`, applied in order to every tensor's name."""


def read_renames(given: Sequence[str]) -> dict[str, str]:
    """Parse `--rename OLD=NEW`; the last = separates, so that OLD may contain one.

    Raises  BadRequest
    """
    rules = {}
    for rule in given:
        old, divider, new = rule.rpartition("=")
        if not divider or not old:
            raise BadRequest(f"--rename is {rule!r}", "give OLD=NEW; OLD is a regular expression.")
        rules[old] = new
    return rules


def renamed(header: Header, rules: Renames) -> Header:
    """Rename the tensors, and the layers in ComfyUI's metadata.

    Raises  BadRequest if a rule is invalid, matches nothing, or gives two tensors one name
    """
    if not rules:
        return header
    names = {name: name for name in header.tensors}
    for old, new in rules.items():
        changed = {name: _substituted(old, new, current) for name, current in names.items()}
        if changed == names:
            raise BadRequest(f"{header.path}: {old!r} changes no tensor's name", _example(header))
        names = changed
    tensors: dict[str, TensorInfo] = {}
    for name, info in header.tensors.items():
        if names[name] in tensors:
            raise BadRequest(
                f"{header.path}: two tensors would be named {names[name]}, one of them {name}"
            )
        tensors[names[name]] = replace(info, name=names[name])

    def follow(module: str) -> str:
        weight = f"{module}.weight"
        for old, new in rules.items():
            weight = _substituted(old, new, weight)
        return weight.removesuffix(".weight")

    number = sum(name != new for name, new in names.items())
    note = f"{number} tensors renamed by {', '.join(f'{old}={new}' for old, new in rules.items())}"
    metadata = with_renamed_layers(header.metadata, follow)
    return replace(header, tensors=tensors, metadata=metadata, notes=(*header.notes, note))


def _substituted(old: str, new: str, name: str) -> str:
    try:
        return re.sub(old, new, name)
    except (re.error, IndexError, RecursionError, OverflowError) as error:
        raise BadRequest(
            f"{old!r} with {new!r} is not a usable regular expression: {error}"
        ) from error


def _example(header: Header) -> str:
    first = next(iter(header.tensors), None)
    return f"the first tensor is named {first}." if first else ""
