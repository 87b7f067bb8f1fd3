"""ComfyUI single files: a note for each quantized layer, and their forerunner, `scaled_fp8`.

nvfp4             X.weight u8 [out, in/2] high nibble first,  X.weight_scale e4m3 in 128x4 tiles,  X.weight_scale_2 f32
float8_e4m3fn     X.weight e4m3 [out, in],  X.weight_scale f32
mxfp8             X.weight e4m3 [out, in],  X.weight_scale e8m0 in 128x4 tiles
int8_tensorwise   X.weight i8 [out, in],  X.weight_scale f32, for the matrix or one for each row
all               X.input_scale f32, where the inputs are rounded with a static scale; else the scale is dynamic
scaled_fp8        X.weight e4m3,  X.scale_weight f32,  X.scale_input f32; a tensor `scaled_fp8` of two elements says
                  that products are in full precision, and a scale_input of 1.0 that there is none

ModelOpt's "ComfyUI" post-processing writes the same notes over low-nibble-first codes. It leaves its own
`quantization_config` in the header, which is how its files are told apart.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mezzotint.bounded_json import parse_object
from mezzotint.formats import modelopt
from mezzotint.formats.components import COMFY_NOTE, PREFIXES
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, sort_out
from mezzotint.formats.header import Header
from mezzotint.formats.layout_evidence import TILES, assume_codes, settle_scales, with_order
from mezzotint.formats.notes import (
    MARKER,
    REFUSED,
    SCHEME_OF_FORMAT,
    kitchen_linear,
    markers,
    noted_linear,
    notes,
    unpadded,
)
from mezzotint.formats.safetensors_file import TensorInfo
from mezzotint.schemes import FP8

LEGACY = "scaled_fp8"
BFL_FORMATS = {"nvfp4", "float8_e4m3fn"}
FULL_PRECISION = "the file asks for products in full precision"
OLD_SCALES = {"weight_scale": ".scale_weight", "input_scale": ".scale_input"}
HIGH_FIRST = (
    "codes high first: as comfy-kitchen writes nvfp4, not verified (other tools have put low first codes under the "
    "same notes: a BF16 base would tell)"
)
LOW_FIRST = "codes low first: ModelOpt's own quantization_config is in the header, and so it packs them"


class Comfy:
    name = "comfy"
    title = "ComfyUI single file"

    def detect(self, header: Header) -> Match | NoMatch:
        if marks := comfy_marks(header):
            return Match(marks)
        if COMFY_NOTE not in header.metadata:
            return NoMatch(f"no {COMFY_NOTE} in the header, no {MARKER} and no {LEGACY} tensor")
        if modelopt_declaration(header):
            return Match(f"{COMFY_NOTE} in the header, beside ModelOpt's quantization_config: written by ModelOpt")
        if not has_bfl_names(header):
            return Match(f"{COMFY_NOTE} in the header")
        return NoMatch("its names are Black Forest Labs', and nothing else says ComfyUI")

    def contents(self, header: Header) -> Contents:
        if legacy_marker(header) is not None:
            return _legacy_contents(header)
        declaration = modelopt_declaration(header)
        if declaration:
            found = modelopt.read(header, declaration)
            tiled = with_order(found.linears, scales=TILES)
            linears = {module: unpadded(header, linear) for module, linear in tiled.items()}
            return settle_scales(header, replace(found, linears=linears, evidence=(LOW_FIRST,)))
        linears = {module: noted_linear(header, module, note) for module, note in notes(header).items()}
        found = sort_out(header, linears, markers(header) | _unwanted_input_scales(header, linears))
        return assume_codes(settle_scales(header, found), HIGH_FIRST)


FORMAT = Comfy()


def has_bfl_names(header: Header) -> bool:
    """Whether blocks are called as in Black Forest Labs' own code."""
    return any(key.startswith(("double_blocks.", "single_blocks.")) for key in header.tensors)


def comfy_marks(header: Header) -> str:
    """What of the file only ComfyUI's files have, or an empty string."""
    if legacy := legacy_marker(header):
        return f"a tensor {legacy}"
    if found := markers(header):
        return f"{len(found)} {MARKER} tensors"
    if COMFY_NOTE not in header.metadata:
        return ""
    if prefix := _prefix(header):
        return f"{COMFY_NOTE} in the header, and names that begin with {prefix}"
    formats = _own_formats(header)
    return f"{COMFY_NOTE} in the header, with layers in {' and '.join(formats)}" if formats else ""


def legacy_marker(header: Header) -> str | None:
    """Name of the `scaled_fp8` tensor, if there is one."""
    return next((prefix + LEGACY for prefix in ("", *PREFIXES) if prefix + LEGACY in header.tensors), None)


def modelopt_declaration(header: Header) -> Mapping[str, Any]:
    """What ModelOpt's post-processing left in the header, flat, or {}."""
    text = header.metadata.get("quantization_config", "")
    if '"modelopt"' not in text:
        return {}
    return {"file": "the header", **modelopt.flat(parse_object(text, f"{header.path}: quantization_config"))}


def _prefix(header: Header) -> str:
    """What ComfyUI's files put before the names, where this one does, or nothing."""
    return next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in header.tensors)), "")


def _own_formats(header: Header) -> list[str]:
    """Formats in the notes that Black Forest Labs' files do not have."""
    written = {str(note.get("format")) for note in notes(header).values()}
    return sorted(written & (SCHEME_OF_FORMAT.keys() | REFUSED) - BFL_FORMATS)


def _unwanted_input_scales(header: Header, linears: Mapping[str, StoredLinear]) -> dict[str, str]:
    """Input scales of layers whose notes ask for products in full precision: {key: reason}"""
    keys = (f"{module}.input_scale" for module, linear in linears.items() if not linear.quantizes_input)
    return dict.fromkeys((key for key in keys if key in header.tensors), FULL_PRECISION)


def _legacy_contents(header: Header) -> Contents:
    marker = str(legacy_marker(header))
    full_precision = header.tensors[marker].shape == (2,)
    linears, ignored = {}, {marker: "marker of the file's format"}
    for info in header.tensors.values():
        if info.name.endswith(".weight") and info.dtype is torch.float8_e4m3fn:
            linear, dropped = _legacy_linear(header, info.name.removesuffix(".weight"), not full_precision)
            linears[linear.module] = linear
            ignored |= dropped
    return sort_out(header, linears, ignored)


def _is_one(info: TensorInfo) -> bool:
    return info.shape in ((), (1,)) and info.read().flatten().tolist() == [1.0]


def _legacy_linear(header: Header, module: str, quantize: bool) -> tuple[StoredLinear, dict[str, str]]:
    """The layer, and its input scale where that is left aside: {key: reason}."""
    linear = kitchen_linear(header, module, FP8, quantize)
    scale, input_scale = (module + suffix for suffix in OLD_SCALES.values())
    keys = {**linear.keys, "weight_scale": scale}
    dropped = {}
    if input_scale in header.tensors:
        if not quantize:
            dropped[input_scale] = FULL_PRECISION
        elif _is_one(header.tensors[input_scale]):
            dropped[input_scale] = "an input scale of 1.0 stands for none"
        else:
            keys["input_scale"] = input_scale
    return replace(linear, keys=keys), dropped
