"""Write a ComfyUI single file in comfy-kitchen's layout; `formats.readers.comfy` describes it.

Layers keep diffusers' names. Their metadata is written twice, because files of both kinds exist:
in `_quantization_metadata` of the header, and in a marker tensor per layer.
"""

import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mezzotint import layouts
from mezzotint.formats import comfy_layers
from mezzotint.formats.comfy_config import LINEAR_DTYPES
from mezzotint.formats.comfy_layers import AWQ_LAYOUT, CODEBOOK, PACKED
from mezzotint.formats.comfy_metadata import COMFY_LAYOUT, MARKER
from mezzotint.formats.components import COMFY_METADATA
from mezzotint.formats.readers import modelopt
from mezzotint.formats.writers.writer import (
    CannotStore,
    Declaration,
    DiffusersLayerWriter,
    Pieces,
    StoredTensors,
    check_parts,
    check_single_piece,
    scalar,
    without_divisor,
)
from mezzotint.schemes import (
    AWQ_CENTERED,
    FP8,
    FP8_E5M2,
    INT4_ROWS,
    INT4_ROWS_A8,
    INT8,
    MXFP8,
    NVFP4,
    W4A8,
    W6A8,
)
from mezzotint.schemes.rotation import MAX_ROTATION, regular_hadamard
from mezzotint.tensor import PLAIN, Layout, QuantTensor

TITLE = "ComfyUI"
SUFFIXES = {**modelopt.SUFFIXES, **comfy_layers.SUFFIXES}
OPTIONAL = {"input_scale": ".input_scale", "bias": ".bias"}
EXTRA = {
    NVFP4.name: {"pre_quant_scale": ".pre_quant_scale"},
    W4A8.name: {"codebook": CODEBOOK},
}
"""Parts that ComfyUI reads in one format alone; in others it would ignore them."""
FORMATS = {
    FP8.name: "float8_e4m3fn",
    FP8_E5M2.name: "float8_e5m2",
    NVFP4.name: "nvfp4",
    MXFP8.name: "mxfp8",
    INT8.name: "int8_tensorwise",
    INT4_ROWS.name: "convrot_w4a4",
    INT4_ROWS_A8.name: "convrot_w4a4",
    W4A8.name: "asym_w4a8_int8",
    W6A8.name: "asym_w4a8_int8",
    AWQ_CENTERED.name: "awq_w4a16",
}
LAYOUTS = {
    NVFP4.name: COMFY_LAYOUT,
    MXFP8.name: Layout(scales=COMFY_LAYOUT.scales),
    INT4_ROWS.name: PACKED,
    INT4_ROWS_A8.name: PACKED,
    W4A8.name: PACKED,
    W6A8.name: PACKED,
    AWQ_CENTERED.name: AWQ_LAYOUT,
}
ONE_PER_MATRIX = (FP8, FP8_E5M2)
ALWAYS_ROTATED = (INT4_ROWS, INT4_ROWS_A8, W4A8, W6A8)
MULTIPLE = {NVFP4.name: 16, MXFP8.name: 32}
"""comfy-kitchen pads both sides to multiples of this, and a file does not state the padding."""


class ComfyWriter(DiffusersLayerWriter):
    name = "comfy"
    title = "ComfyUI single file"
    file = True
    needs_values = ("rotation",)
    constants = (MARKER,)

    def layer(self, group: Mapping[str, Pieces]) -> StoredTensors | CannotStore:
        ((module, pieces),) = group.items()
        piece, changes = without_divisor(pieces[0])
        return (
            check_single_piece(pieces, TITLE)
            or _check(piece)
            or StoredTensors(_tensors(module, piece), changes)
        )

    def declare(
        self, layers: Mapping[str, Pieces], plain: Collection[str]
    ) -> Declaration | CannotStore:
        layer_metadata = {module: _layer_metadata(pieces[0]) for module, pieces in layers.items()}
        metadata = {COMFY_METADATA: json.dumps({"format_version": "1.0", "layers": layer_metadata})}
        return Declaration(None, metadata if layers else {})


TARGET = ComfyWriter()


def _layer_metadata(piece: QuantTensor) -> dict[str, str | bool | int]:
    """Return a layer's metadata. ComfyUI quantizes activations unless it requests otherwise."""
    metadata: dict[str, str | bool | int] = {"format": FORMATS[piece.scheme.name]}
    if piece.scheme.quantize_activation is not None and not piece.quantizes_activation:
        metadata["full_precision_matrix_mult"] = True
    if "rotation" in piece.parts:
        metadata |= {"convrot": True} if piece.scheme is INT8 else {}
        metadata["convrot_groupsize"] = len(piece.parts["rotation"])
    if piece.scheme is INT4_ROWS_A8:
        metadata["linear_dtype"] = LINEAR_DTYPES[1]
    if piece.scheme in (W4A8, W6A8, AWQ_CENTERED):
        metadata["group_size"] = piece.shape[1] // piece.parts["block_scale"].shape[1]
    return metadata


def _tensors(module: str, piece: QuantTensor) -> dict[str, Tensor]:
    suffixes = _suffixes(piece)
    arranged = layouts.convert(piece, LAYOUTS.get(piece.scheme.name, PLAIN))
    tensors = {
        module + suffixes[part]: _stored(piece, part, value)
        for part, value in arranged.parts.items()
        if part in suffixes
    }
    marker = json.dumps(_layer_metadata(piece)).encode()
    return tensors | {module + MARKER: torch.frombuffer(bytearray(marker), dtype=torch.uint8)}


def _suffixes(piece: QuantTensor) -> dict[str, str]:
    """Return {part: ending of its tensor's name}; the metadata states a rotation."""
    name = piece.scheme.name
    return {**SUFFIXES[name], **OPTIONAL, **EXTRA.get(name, {})}


def _stored(piece: QuantTensor, part: str, value: Tensor) -> Tensor:
    """Return a part in the shape that ComfyUI multiplies with."""
    if part in ("global_scale", "input_scale"):
        return scalar(value)
    if part != "weight_scale":
        return value
    if value.numel() == 1 and piece.shape[0] != 1:
        return scalar(value)
    # INT8 codes [out, in] times scales [out] would scale the columns.
    shape = (-1,) if piece.scheme in (INT4_ROWS, INT4_ROWS_A8) else (-1, 1)
    wanted = value.reshape(shape)
    return value if wanted.shape == value.shape else wanted


def _check(piece: QuantTensor) -> CannotStore | None:
    name = piece.scheme.name
    if name not in FORMATS:
        return CannotStore(f"is {piece.scheme.title}, and {TITLE} has no such format")
    if piece.scheme in ONE_PER_MATRIX and piece.parts["weight_scale"].numel() != 1:
        return CannotStore(f"has one FP8 scale per row, and {TITLE} stores one per matrix")
    multiple = MULTIPLE.get(name, 1)
    if any(side % multiple for side in piece.shape):
        return CannotStore(
            f"is {piece.shape[0]} x {piece.shape[1]}, and {TITLE} pads sides to multiples of "
            f"{multiple}"
        )
    return _check_rotation(piece) or check_parts(piece, {**_suffixes(piece), "rotation": ""}, TITLE)


def _check_rotation(piece: QuantTensor) -> CannotStore | None:
    """Return a refusal of a rotation that the metadata cannot state, or of a missing one."""
    signs = piece.parts.get("rotation")
    if signs is None:
        needed = piece.scheme in ALWAYS_ROTATED
        return CannotStore(f"is not rotated, and {TITLE} rotates its inputs") if needed else None
    if not _is_regular(signs):
        return CannotStore(f"is rotated by another matrix than {TITLE}'s regular Hadamard one")
    return None


def _is_regular(signs: Tensor) -> bool:
    size = len(signs)
    is_power_of_four = size.bit_count() == 1 and size.bit_length() % 2 == 1
    known = 4 <= size <= MAX_ROTATION and is_power_of_four
    return known and torch.equal(signs, regular_hadamard(size))
