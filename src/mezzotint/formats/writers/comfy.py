"""Writing a ComfyUI single file as comfy-kitchen arranges it; `notes.py` describes the tensors.

Layers keep diffusers' names. Each has its note twice, as files of both kinds occur: in `_quantization_metadata` and as
a marker tensor.
"""

import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mezzotint import layouts
from mezzotint.formats.comfy_metadata import COMFY_LAYOUT, MARKER
from mezzotint.formats.components import COMFY_NOTE
from mezzotint.formats.readers.modelopt import SUFFIXES
from mezzotint.formats.writers.writer import (
    CannotStore,
    Declaration,
    DiffusersLayerWriter,
    Pieces,
    StoredTensors,
    refuse_extra_parts,
    refuse_pieces,
    scalar,
)
from mezzotint.schemes import FP8, MXFP8, NVFP4
from mezzotint.tensor import PLAIN, Layout, QuantTensor

TITLE = "ComfyUI"
OPTIONAL = {"input_scale": ".input_scale", "bias": ".bias", "pre_quant_scale": ".pre_quant_scale"}
FORMATS = {FP8.name: "float8_e4m3fn", NVFP4.name: "nvfp4", MXFP8.name: "mxfp8"}
LAYOUTS = {
    FP8.name: PLAIN,
    NVFP4.name: COMFY_LAYOUT,
    MXFP8.name: Layout(scales=COMFY_LAYOUT.scales),
}
SCALARS = {"weight_scale", "global_scale", "input_scale"}
MULTIPLE = {FP8.name: 1, NVFP4.name: 16, MXFP8.name: 32}
"""What comfy-kitchen pads both sides to; a file does not say by how much."""


class ComfyWriter(DiffusersLayerWriter):
    name = "comfy"
    title = "ComfyUI single file"
    file = True

    def layer(self, group: Mapping[str, Pieces]) -> StoredTensors | CannotStore:
        ((module, pieces),) = group.items()
        return (
            refuse_pieces(pieces, TITLE)
            or _refusal(pieces[0])
            or StoredTensors(_tensors(module, pieces[0]))
        )

    def declare(
        self, layers: Mapping[str, Pieces], plain: Collection[str]
    ) -> Declaration | CannotStore:
        notes = {module: _note(pieces[0]) for module, pieces in layers.items()}
        metadata = {COMFY_NOTE: json.dumps({"format_version": "1.0", "layers": notes})}
        return Declaration(None, metadata if notes else {})


TARGET = ComfyWriter()


def _note(piece: QuantTensor) -> dict[str, str | bool]:
    """ComfyUI rounds the inputs of every layer that does not ask for a product in full precision."""
    note: dict[str, str | bool] = {"format": FORMATS[piece.scheme.name]}
    return note if piece.quantizes_activation else note | {"full_precision_matrix_mult": True}


def _tensors(module: str, piece: QuantTensor) -> dict[str, Tensor]:
    suffixes = SUFFIXES[piece.scheme.name] | OPTIONAL
    arranged = layouts.convert(piece, LAYOUTS[piece.scheme.name])
    tensors = {
        module + suffixes[part]: scalar(value) if part in SCALARS else value
        for part, value in arranged.parts.items()
    }
    marker = json.dumps(_note(piece)).encode()
    return tensors | {module + MARKER: torch.frombuffer(bytearray(marker), dtype=torch.uint8)}


def _refusal(piece: QuantTensor) -> CannotStore | None:
    name = piece.scheme.name
    if name not in FORMATS:
        return CannotStore(f"is {piece.scheme.title}, and {TITLE} holds FP8, NVFP4 and MXFP8")
    if piece.scheme is FP8 and piece.parts["weight_scale"].numel() != 1:
        return CannotStore(f"has one FP8 scale for each row, and {TITLE} has one for the matrix")
    if any(side % MULTIPLE[name] for side in piece.shape):
        return CannotStore(
            f"is {piece.shape[0]} x {piece.shape[1]}, and {TITLE} pads sides to multiples of {MULTIPLE[name]}"
        )
    return refuse_extra_parts(piece, SUFFIXES[name] | OPTIONAL, TITLE)
