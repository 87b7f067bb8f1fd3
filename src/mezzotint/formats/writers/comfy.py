"""Write a ComfyUI single file in comfy-kitchen's layout; `formats.readers.comfy` describes it.

Layers keep diffusers' names. Their metadata is written twice, because files of both kinds exist:
in `_quantization_metadata` of the header, and in a marker tensor per layer.
"""

import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mezzotint import layouts
from mezzotint.formats.comfy_metadata import COMFY_LAYOUT, MARKER
from mezzotint.formats.components import COMFY_METADATA
from mezzotint.formats.readers.modelopt import SUFFIXES
from mezzotint.formats.writers.writer import (
    CannotStore,
    Declaration,
    DiffusersLayerWriter,
    Pieces,
    StoredTensors,
    check_parts,
    check_single_piece,
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
"""comfy-kitchen pads both sides to multiples of this, and a file does not state the padding."""


class ComfyWriter(DiffusersLayerWriter):
    name = "comfy"
    title = "ComfyUI single file"
    file = True

    def layer(self, group: Mapping[str, Pieces]) -> StoredTensors | CannotStore:
        ((module, pieces),) = group.items()
        return (
            check_single_piece(pieces, TITLE)
            or _check(pieces[0])
            or StoredTensors(_tensors(module, pieces[0]))
        )

    def declare(
        self, layers: Mapping[str, Pieces], plain: Collection[str]
    ) -> Declaration | CannotStore:
        layer_metadata = {module: _layer_metadata(pieces[0]) for module, pieces in layers.items()}
        metadata = {COMFY_METADATA: json.dumps({"format_version": "1.0", "layers": layer_metadata})}
        return Declaration(None, metadata if layers else {})


TARGET = ComfyWriter()


def _layer_metadata(piece: QuantTensor) -> dict[str, str | bool]:
    """Return a layer's metadata. ComfyUI quantizes activations unless it requests otherwise."""
    metadata: dict[str, str | bool] = {"format": FORMATS[piece.scheme.name]}
    if not piece.quantizes_activation:
        metadata["full_precision_matrix_mult"] = True
    return metadata


def _tensors(module: str, piece: QuantTensor) -> dict[str, Tensor]:
    suffixes = SUFFIXES[piece.scheme.name] | OPTIONAL
    converted = layouts.convert(piece, LAYOUTS[piece.scheme.name])
    tensors = {
        module + suffixes[part]: scalar(value) if part in SCALARS else value
        for part, value in converted.parts.items()
    }
    marker = json.dumps(_layer_metadata(piece)).encode()
    return tensors | {module + MARKER: torch.frombuffer(bytearray(marker), dtype=torch.uint8)}


def _check(piece: QuantTensor) -> CannotStore | None:
    name = piece.scheme.name
    if name not in FORMATS:
        return CannotStore(f"is {piece.scheme.title}, and {TITLE} stores FP8, NVFP4 and MXFP8")
    if piece.scheme is FP8 and piece.parts["weight_scale"].numel() != 1:
        return CannotStore(f"has one FP8 scale per row, and {TITLE} stores one per matrix")
    if any(side % MULTIPLE[name] for side in piece.shape):
        return CannotStore(
            f"is {piece.shape[0]} x {piece.shape[1]}, and {TITLE} pads sides to multiples of "
            f"{MULTIPLE[name]}"
        )
    return check_parts(piece, SUFFIXES[name] | OPTIONAL, TITLE)
