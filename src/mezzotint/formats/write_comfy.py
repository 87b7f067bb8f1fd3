"""Writing a ComfyUI single file in ComfyUI's own layout; `comfy.py` describes the tensors.

Layers keep diffusers' names. Each has its note twice, as files of both kinds occur: in `_quantization_metadata` and as
a marker tensor.
"""

import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mezzotint import layouts
from mezzotint.formats.writing import Declaration, DiffusersNames, Pieces, Refusal, Written, in_pieces, scalar, unplaced
from mezzotint.tensor import Layout, QuantTensor

TITLE = "ComfyUI"
LAYOUT = Layout(codes="high_first", scales="tiles_128x4")
MARKER = ".comfy_quant"
COMMON = {"input_scale": ".input_scale", "bias": ".bias", "pre_quant_scale": ".pre_quant_scale"}
SUFFIXES = {
    "fp8": {"codes": ".weight", "weight_scale": ".weight_scale"} | COMMON,
    "nvfp4": {"codes": ".weight", "block_scale": ".weight_scale", "global_scale": ".weight_scale_2"} | COMMON,
}
FORMATS = {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}
SCALARS = {"weight_scale", "global_scale", "input_scale"}
MULTIPLE = 16


class ComfyWriter(DiffusersNames):
    name = "comfy"
    title = "ComfyUI single file"
    file = True

    def layer(self, group: Mapping[str, Pieces]) -> Written | Refusal:
        tensors: dict[str, Tensor] = {}
        for module, pieces in group.items():
            if len(pieces) > 1:
                return in_pieces(pieces, TITLE)
            (piece,) = pieces
            refusal = _refusal(piece)
            if refusal is not None:
                return refusal
            tensors |= _tensors(module, piece)
        return Written(tensors)

    def declare(self, layers: Mapping[str, Pieces], plain: Collection[str]) -> Declaration | Refusal:
        notes = {module: _note(pieces[0]) for module, pieces in layers.items()}
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": notes})}
        return Declaration(None, metadata if notes else {})


WRITER = ComfyWriter()


def _note(piece: QuantTensor) -> dict[str, str]:
    return {"format": FORMATS[piece.scheme.name]}


def _tensors(module: str, piece: QuantTensor) -> dict[str, Tensor]:
    suffixes = SUFFIXES[piece.scheme.name]
    arranged = layouts.convert(piece, LAYOUT) if piece.scheme.name == "nvfp4" else piece
    tensors = {
        module + suffixes[part]: scalar(value) if part in SCALARS else value for part, value in arranged.parts.items()
    }
    marker = json.dumps(_note(piece)).encode()
    return tensors | {module + MARKER: torch.frombuffer(bytearray(marker), dtype=torch.uint8)}


def _refusal(piece: QuantTensor) -> Refusal | None:
    if piece.scheme.name not in SUFFIXES:
        return Refusal(f"is {piece.scheme.title}, and {TITLE} holds FP8 and NVFP4")
    if piece.scheme.name == "fp8" and piece.parts["weight_scale"].numel() != 1:
        return Refusal(f"has one FP8 scale for each row, and {TITLE} has one for the matrix")
    if any(side % MULTIPLE for side in piece.shape):
        return Refusal(f"is {piece.shape[0]} x {piece.shape[1]}, and {TITLE} pads sides to multiples of {MULTIPLE}")
    return unplaced(piece, SUFFIXES[piece.scheme.name], TITLE)
