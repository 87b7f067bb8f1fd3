"""Read Mezzotint's own format: diffusers names, row-major, low nibble first, everything stated.

config.json holds the model's configuration. Its `quantization_config` lists the quantized layers,
the scheme and parts of each, and which inputs are quantized with a scale computed at each call.
The codes of layer X are X.weight; any other part P is X.P. A layer in several pieces along its
input features is listed under `pieces`, and its pieces are X.0, X.1, ... All parts are plain, and
plain tensors keep their names. The complete description is docs/formats/mezzotint.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

from annotated_types import Len
from pydantic import Field, PositiveInt

from mezzotint.errors import BrokenFile, UnreadFormat
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.schemes import Scheme, schemes
from mezzotint.tensor import PLAIN
from mezzotint.untrusted.escaping import cut, shown
from mezzotint.untrusted.schema import Entries, validated

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
    """The layers that a quantization_config lists."""

    layers: list[LayerGroup]
    pieces: dict[str, Annotated[list[str], Len(1)]] = Field(default_factory=dict)


class Mezzotint:
    name = METHOD
    title = "Mezzotint"

    def detect(self, header: Header) -> Match | NoMatch:
        config = quantization_config(header)
        if config.get("quant_method") != METHOD:
            return NoMatch(f"config.json has no quantization_config with quant_method {METHOD}")
        version = shown(config.get("format_version"))
        return Match(f"config.json: quant_method {METHOD}, format_version {version}")

    def contents(self, header: Header) -> Contents:
        config = quantization_config(header)
        if config.get("format_version") != VERSION or config.get("layout") != asdict(PLAIN):
            raise UnreadFormat(
                f"{header.path}: format_version {shown(config.get('format_version'))} with layout "
                f"{shown(config.get('layout'))}, expected {VERSION} with {asdict(PLAIN)}",
                "a newer Mezzotint may read it.",
            )
        declared = validated(Declared, config, _location(header), RESTORE)
        linears: dict[str, StoredLinear] = {}
        for linear in _linears(header, declared):
            if linear.module in linears:
                raise _invalid(header, f"layer {linear.module} is listed twice")
            linears[linear.module] = linear
        return classify_tensors(header, linears, {}, _pieces(header, declared, linears))


FORMAT = Mezzotint()


def key_of(module: str, part: str) -> str:
    """Return the tensor name of a layer's part."""
    return f"{module}.{'weight' if part == 'codes' else part}"


def quantization_config(header: Header) -> Mapping[str, Any]:
    """Return the quantization_config of config.json, {} if there is none."""
    config = header.config.get("quantization_config")
    return config if isinstance(config, dict) else {}


def _linears(header: Header, declared: Declared) -> Iterator[StoredLinear]:
    """Yield the listed layers. Raises BrokenFile for an entry that no layer can have."""
    for group in declared.layers:
        scheme = _scheme(header, group)
        for module, (rows, columns) in group.modules.items():
            keys = {part: key_of(module, part) for part in group.parts}
            if not any(key in header.tensors for key in keys.values()):
                raise _invalid(
                    header, f"layer {cut(module)} is listed, and none of its tensors is there"
                )
            yield StoredLinear(
                module, scheme, PLAIN, (rows, columns), keys, dynamic_input=group.dynamic_input
            )


def _scheme(header: Header, group: LayerGroup) -> Scheme:
    scheme = schemes().get(group.scheme)
    if scheme is None:
        raise _invalid(header, f"layers has an entry with the unknown scheme {shown(group.scheme)}")
    allowed = scheme.parts.keys() | scheme.optional.keys()
    if not scheme.parts.keys() <= set(group.parts) <= allowed:
        raise _invalid(
            header, f"{scheme.title} layers are listed with the parts {shown(group.parts)}"
        )
    return scheme


def _pieces(
    header: Header, declared: Declared, linears: Mapping[str, StoredLinear]
) -> dict[str, tuple[str, ...]]:
    for module, names in declared.pieces.items():
        if unlisted := [name for name in names if name not in linears]:
            raise _invalid(
                header,
                f"pieces of {cut(module)} names a layer that is not listed, {cut(unlisted[0])}",
            )
    return {module: tuple(names) for module, names in declared.pieces.items()}


def _invalid(header: Header, problem: str) -> BrokenFile:
    return BrokenFile(f"{_location(header)}: {problem}", RESTORE)


def _location(header: Header) -> str:
    return f"{header.path}: quantization_config of config.json"
