"""ComfyUI single files: one JSON note per quantized layer says what the layer is.

The notes stand in the header (`_quantization_metadata`: {"layers": {"X": {"format": "nvfp4"}}}) or in a marker tensor
X.comfy_quant (uint8, the JSON text). Both occur.

nvfp4           X.weight u8 [out, in/2] high nibble first,  X.weight_scale e4m3 in 128x4 tiles,  X.weight_scale_2 f32 []
float8_e4m3fn   X.weight e4m3 [out, in],  X.weight_scale f32 []
both            X.input_scale f32 [], where the inputs are quantized

ModelOpt's "ComfyUI" post-processing writes the same notes over low-nibble-first codes. It leaves its own
`quantization_config` in the header, which is how its files are told apart.
"""

import json
from collections.abc import Mapping
from typing import Any

from mezzotint.errors import BrokenFile, MissingTensor, UnknownFormat
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, sort_out
from mezzotint.formats.header import Header
from mezzotint.formats.modelopt import COMFY_NOTE, OPTIONAL_SUFFIXES, SUFFIXES
from mezzotint.schemes import FP8, NVFP4
from mezzotint.tensor import PLAIN, Layout

MARKER = ".comfy_quant"
COMFY_LAYOUT = Layout(codes="high_first", scales="tiles_128x4")
MODELOPT_LAYOUT = Layout(codes="low_first", scales="tiles_128x4")
SCHEME_OF_FORMAT = {"nvfp4": NVFP4, "float8_e4m3fn": FP8, "fp8": FP8}


class Comfy:
    name = "comfy"
    title = "ComfyUI single file"

    def detect(self, header: Header) -> Match | NoMatch:
        markers = sum(key.endswith(MARKER) for key in header.tensors)
        if COMFY_NOTE not in header.metadata and not markers:
            return NoMatch(f"no {COMFY_NOTE} in the header and no {MARKER} tensor")
        where = f"{COMFY_NOTE} in the header" if COMFY_NOTE in header.metadata else f"{markers} {MARKER} tensors"
        if _by_modelopt(header):
            return Match(f"{where}; written by ModelOpt (its quantization_config is in the header): low nibble first")
        return Match(f"{where}; ComfyUI's own layout: high nibble first, scales in 128x4 tiles")

    def contents(self, header: Header) -> Contents:
        layout = MODELOPT_LAYOUT if _by_modelopt(header) else COMFY_LAYOUT
        linears = {module: _linear(header, module, note, layout) for module, note in _notes(header).items()}
        markers = {key: "marker of the layer's format" for key in header.tensors if key.endswith(MARKER)}
        return sort_out(header, linears, markers)


FORMAT = Comfy()


def _by_modelopt(header: Header) -> bool:
    return '"modelopt"' in header.metadata.get("quantization_config", "")


def _notes(header: Header) -> dict[str, Mapping[str, Any]]:
    """{module: its note}, from the header's note and from the markers."""
    notes: dict[str, Mapping[str, Any]] = {}
    if COMFY_NOTE in header.metadata:
        notes |= _parse(header.metadata[COMFY_NOTE], f"{header.path}: {COMFY_NOTE}").get("layers", {})
    for key, info in header.tensors.items():
        if key.endswith(MARKER):
            notes[key.removesuffix(MARKER)] = _parse(bytes(info.read().tolist()), f"{info.file}: {key}")
    return notes


def _parse(text: str | bytes, where: str) -> Mapping[str, Any]:
    try:
        note = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{where} is not valid JSON ({error})") from error
    if not isinstance(note, dict):
        raise BrokenFile(f"{where} holds {type(note).__name__}, expected an object")
    return note


def _linear(header: Header, module: str, note: Mapping[str, Any], layout: Layout) -> StoredLinear:
    scheme = SCHEME_OF_FORMAT.get(str(note.get("format")))
    if scheme is None:
        raise UnknownFormat(
            f"{header.path}: layer {module} has format {note.get('format')!r}, expected {' or '.join(SCHEME_OF_FORMAT)}"
        )
    weight = header.tensors.get(f"{module}.weight")
    if weight is None:
        raise MissingTensor(f"{header.path}: the notes name layer {module}, and {module}.weight is not there")
    keys = {part: module + suffix for part, suffix in SUFFIXES[scheme.name].items()}
    keys |= {part: module + suffix for part, suffix in OPTIONAL_SUFFIXES.items() if module + suffix in header.tensors}
    rows, columns = (*weight.shape, 0, 0)[:2]
    if scheme is FP8:
        return StoredLinear(module, scheme, PLAIN, (rows, columns), keys)
    return StoredLinear(module, scheme, layout, (rows, columns * 2), keys)
