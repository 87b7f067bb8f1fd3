"""Write Mezzotint's own format; `formats.readers.mezzotint` describes it."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from mezzotint.formats.readers.mezzotint import FORMAT, METHOD, VERSION, key_of
from mezzotint.formats.writers.writer import (
    CannotStore,
    Declaration,
    DiffusersLayerWriter,
    Pieces,
    StoredTensors,
    needs_dynamic_input,
)
from mezzotint.tensor import PLAIN


class MezzotintWriter(DiffusersLayerWriter):
    name = METHOD
    title = FORMAT.title
    file = False

    def layer(self, group: Mapping[str, Pieces]) -> StoredTensors | CannotStore:
        ((module, pieces),) = group.items()
        named = zip(_piece_names(module, len(pieces)), pieces, strict=True)
        return StoredTensors(
            {
                key_of(name, part): value
                for name, piece in named
                for part, value in piece.parts.items()
            }
        )

    def declare(
        self, layers: Mapping[str, Pieces], plain: Collection[str]
    ) -> Declaration | CannotStore:
        if not layers:
            return Declaration()
        entries: dict[str, Any] = {
            "quant_method": METHOD,
            "format_version": VERSION,
            "layout": asdict(PLAIN),
            "layers": _layer_groups(layers),
        }
        split = {
            module: _piece_names(module, len(pieces))
            for module, pieces in layers.items()
            if len(pieces) > 1
        }
        return Declaration(entries | ({"pieces": split} if split else {}))


TARGET = MezzotintWriter()


def _piece_names(module: str, number: int) -> list[str]:
    return [module] if number == 1 else [f"{module}.{i}" for i in range(number)]


def _layer_groups(layers: Mapping[str, Pieces]) -> list[dict[str, Any]]:
    """Return the entries of `layers`: one per scheme and set of parts, with shapes (out, in)."""
    groups: dict[tuple[str, tuple[str, ...], bool], dict[str, list[int]]] = {}
    for module, pieces in layers.items():
        for name, piece in zip(_piece_names(module, len(pieces)), pieces, strict=True):
            kind = (piece.scheme.name, tuple(sorted(piece.parts)), needs_dynamic_input(piece))
            groups.setdefault(kind, {})[name] = list(piece.shape)
    return [
        {"scheme": scheme, "parts": list(parts)}
        | ({"dynamic_input": True} if dynamic else {})
        | {"modules": shapes}
        for (scheme, parts, dynamic), shapes in groups.items()
    ]
