"""Mezzotint's own format: diffusers names, row-major, low nibble first, everything stated.

config.json holds the model's configuration and, under `quantization_config`, which layers are quantized, by which
scheme, with which parts, and which inputs are rounded with a scale of each call. The codes of layer X are X.weight; any
other part P is X.P. A layer in several pieces side by side is listed under `pieces`, and its pieces are X.0, X.1, ...
All parts are plain; plain tensors keep their names. docs/formats/mezzotint.md is the whole description.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from mezzotint.errors import BrokenFile, UnknownFormat
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, sort_out
from mezzotint.formats.header import Header
from mezzotint.formats.writing import Declaration, DiffusersNames, Pieces, Refusal, Written, needs_dynamic_input
from mezzotint.schemes import SCHEMES
from mezzotint.tensor import PLAIN

METHOD = "mezzotint"
VERSION = 1


class Mezzotint:
    name = METHOD
    title = "Mezzotint"

    def detect(self, header: Header) -> Match | NoMatch:
        config = quantization_config(header)
        if config.get("quant_method") != METHOD:
            return NoMatch(f"config.json has no quantization_config with quant_method {METHOD}")
        return Match(f"config.json: quant_method {METHOD}, format_version {config.get('format_version')}")

    def contents(self, header: Header) -> Contents:
        config = quantization_config(header)
        if config.get("format_version") != VERSION or config.get("layout") != asdict(PLAIN):
            raise UnknownFormat(
                f"{header.path}: format_version {config.get('format_version')!r} with layout {config.get('layout')!r}, "
                f"expected {VERSION} with {asdict(PLAIN)}",
                "a newer Mezzotint may read it.",
            )
        linears = {linear.module: linear for linear in _linears(header, config)}
        return sort_out(header, linears, {}, _joined(header, config, linears))


FORMAT = Mezzotint()


class MezzotintWriter(DiffusersNames):
    name = METHOD
    title = Mezzotint.title
    file = False

    def layer(self, group: Mapping[str, Pieces]) -> Written | Refusal:
        ((module, pieces),) = group.items()
        named = zip(_piece_names(module, len(pieces)), pieces, strict=True)
        return Written({key_of(name, part): value for name, piece in named for part, value in piece.parts.items()})

    def declare(self, layers: Mapping[str, Pieces], plain: Collection[str]) -> Declaration | Refusal:
        if not layers:
            return Declaration()
        entries: dict[str, Any] = {"quant_method": METHOD, "format_version": VERSION, "layout": asdict(PLAIN)}
        entries["layers"] = _listed(layers)
        pieces = {module: _piece_names(module, len(many)) for module, many in layers.items() if len(many) > 1}
        return Declaration(entries | ({"pieces": pieces} if pieces else {}))


TARGET = MezzotintWriter()


def key_of(module: str, part: str) -> str:
    """The tensor name of a layer's part."""
    return f"{module}.{'weight' if part == 'codes' else part}"


def _piece_names(module: str, number: int) -> list[str]:
    return [module] if number == 1 else [f"{module}.{i}" for i in range(number)]


def _listed(layers: Mapping[str, Pieces]) -> list[dict[str, Any]]:
    """Layers with the same scheme and parts, listed together with their shapes (out, in)."""
    alike: dict[tuple[str, tuple[str, ...], bool], dict[str, list[int]]] = {}
    for module, pieces in layers.items():
        for name, piece in zip(_piece_names(module, len(pieces)), pieces, strict=True):
            kind = (piece.scheme.name, tuple(sorted(piece.parts)), needs_dynamic_input(piece))
            alike.setdefault(kind, {})[name] = list(piece.shape)
    return [
        {"scheme": scheme, "parts": list(parts)} | ({"dynamic_input": True} if dynamic else {}) | {"modules": names}
        for (scheme, parts, dynamic), names in alike.items()
    ]


def quantization_config(header: Header) -> Mapping[str, Any]:
    """What config.json says of the quantization, {} if it says nothing."""
    config = header.config.get("quantization_config")
    return config if isinstance(config, dict) else {}


def _linears(header: Header, config: Mapping[str, Any]) -> Iterator[StoredLinear]:
    for entry in _list(header, config, "layers"):
        scheme = SCHEMES.get(str(entry.get("scheme")))
        parts, modules = entry.get("parts"), entry.get("modules")
        if scheme is None or not isinstance(parts, list) or not isinstance(modules, dict):
            raise _bad(header, f"layers has an entry with scheme {entry.get('scheme')!r}, which is not one known here")
        known = scheme.parts.keys() | scheme.optional.keys()
        if not scheme.parts.keys() <= set(parts) <= known:
            raise _bad(header, f"{scheme.title} layers are listed with the parts {', '.join(map(str, parts))}")
        for module, shape in modules.items():
            if not _is_shape(shape):
                raise _bad(header, f"layer {module} is listed with shape {shape!r}")
            keys = {part: key_of(module, part) for part in parts}
            if not any(key in header.tensors for key in keys.values()):
                raise _bad(header, f"layer {module} is listed, and none of its tensors is there")
            yield StoredLinear(
                module, scheme, PLAIN, (shape[0], shape[1]), keys, dynamic_input=entry.get("dynamic_input") is True
            )


def _joined(
    header: Header, config: Mapping[str, Any], linears: Mapping[str, StoredLinear]
) -> dict[str, tuple[str, ...]]:
    pieces = config.get("pieces", {})
    named = isinstance(pieces, dict) and all(isinstance(names, list) and names for names in pieces.values())
    if not named or not all(name in linears for names in pieces.values() for name in names):
        raise _bad(header, "pieces names a layer that is not listed")
    return {module: tuple(names) for module, names in pieces.items()}


def _list(header: Header, config: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    entries = config.get(name)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _bad(header, f"{name} is no list of objects")
    return entries


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def _bad(header: Header, problem: str) -> BrokenFile:
    return BrokenFile(
        f"{header.path}: quantization_config of config.json: {problem}",
        "restore the config.json that was written with these weights.",
    )
