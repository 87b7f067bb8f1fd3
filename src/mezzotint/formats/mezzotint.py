"""Mezzotint's own format: diffusers names, row-major, low nibble first, everything stated.

config.json holds the model's configuration and, under `quantization_config`, which layers are quantized, by which
scheme, with which parts, and which inputs are rounded with a scale of each call. The codes of layer X are X.weight; any
other part P is X.P. A layer in several pieces side by side is listed under `pieces`, and its pieces are X.0, X.1, ...
All parts are plain; plain tensors keep their names. docs/formats/mezzotint.md is the whole description.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

from annotated_types import Len
from pydantic import Field, PositiveInt

from mezzotint.errors import BrokenFile, UnreadFormat
from mezzotint.escaping import cut, shown
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, sort_out
from mezzotint.formats.header import Header
from mezzotint.formats.writing import Declaration, DiffusersNames, Pieces, Refusal, Written, needs_dynamic_input
from mezzotint.schema import Entries, validated
from mezzotint.schemes import SCHEMES
from mezzotint.tensor import PLAIN

METHOD = "mezzotint"
VERSION = 1
RESTORE = "restore the config.json that was written with these weights."


class LayerGroup(Entries):
    """Layers of one scheme with the same parts; `modules` is {name: [out, in]}."""

    scheme: str
    parts: list[str]
    modules: dict[str, Annotated[list[PositiveInt], Len(2, 2)]]
    dynamic_input: bool = False


class Declared(Entries):
    """What the quantization_config lists."""

    layers: list[LayerGroup]
    pieces: dict[str, Annotated[list[str], Len(1)]] = Field(default_factory=dict)


class Mezzotint:
    name = METHOD
    title = "Mezzotint"

    def detect(self, header: Header) -> Match | NoMatch:
        config = quantization_config(header)
        if config.get("quant_method") != METHOD:
            return NoMatch(f"config.json has no quantization_config with quant_method {METHOD}")
        return Match(f"config.json: quant_method {METHOD}, format_version {shown(config.get('format_version'))}")

    def contents(self, header: Header) -> Contents:
        config = quantization_config(header)
        if config.get("format_version") != VERSION or config.get("layout") != asdict(PLAIN):
            raise UnreadFormat(
                f"{header.path}: format_version {shown(config.get('format_version'))} with layout "
                f"{shown(config.get('layout'))}, expected {VERSION} with {asdict(PLAIN)}",
                "a newer Mezzotint may read it.",
            )
        declared = validated(Declared, config, _where(header), RESTORE)
        linears: dict[str, StoredLinear] = {}
        for linear in _linears(header, declared):
            if linear.module in linears:
                raise _bad(header, f"layer {linear.module} is listed twice")
            linears[linear.module] = linear
        return sort_out(header, linears, {}, _joined(header, declared, linears))


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


def _linears(header: Header, declared: Declared) -> Iterator[StoredLinear]:
    for group in declared.layers:
        scheme = SCHEMES.get(group.scheme)
        if scheme is None:
            raise _bad(header, f"layers has an entry with scheme {shown(group.scheme)}, which is not one known here")
        known = scheme.parts.keys() | scheme.optional.keys()
        if not scheme.parts.keys() <= set(group.parts) <= known:
            raise _bad(header, f"{scheme.title} layers are listed with the parts {shown(group.parts)}")
        for module, (rows, columns) in group.modules.items():
            keys = {part: key_of(module, part) for part in group.parts}
            if not any(key in header.tensors for key in keys.values()):
                raise _bad(header, f"layer {cut(module)} is listed, and none of its tensors is there")
            yield StoredLinear(module, scheme, PLAIN, (rows, columns), keys, dynamic_input=group.dynamic_input)


def _joined(header: Header, declared: Declared, linears: Mapping[str, StoredLinear]) -> dict[str, tuple[str, ...]]:
    for module, names in declared.pieces.items():
        if strange := [name for name in names if name not in linears]:
            raise _bad(header, f"pieces of {cut(module)} names a layer that is not listed, {cut(strange[0])}")
    return {module: tuple(names) for module, names in declared.pieces.items()}


def _bad(header: Header, problem: str) -> BrokenFile:
    return BrokenFile(f"{_where(header)}: {problem}", RESTORE)


def _where(header: Header) -> str:
    return f"{header.path}: quantization_config of config.json"
