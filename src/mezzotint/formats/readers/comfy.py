"""Read ComfyUI's single files: metadata for each quantized layer, or the older `scaled_fp8`.

nvfp4             X.weight u8 [out, in/2] high nibble first,  X.weight_scale e4m3 in 128x4 tiles,
                  X.weight_scale_2 f32
float8_e4m3fn     X.weight e4m3 [out, in],  X.weight_scale f32
float8_e5m2       X.weight e5m2 [out, in],  X.weight_scale f32
*_blockwise       X.weight e4m3 or i8 [out, in],  X.weight_scale f32 [out/side, in/side]
mxfp8             X.weight e4m3 [out, in],  X.weight_scale e8m0 in 128x4 tiles
int8_tensorwise   X.weight i8 [out, in],  X.weight_scale f32 for the matrix or per row
convrot_w4a4      X.weight i8 [out, in/2] low nibble first,  X.weight_scale f32 [out]
asym_w4a8_int8    X.weight i8 [out, in/2],  X.weight_s_rel e4m3 [out, in/16],
                  X.weight_s_channel f32 [out],  X.weight_codebook f32 [16]
awq_w4a16         X.weight i8 [out, in/2],  X.weight_scale and X.weight_zeros [in/64, out]
all               X.input_scale f32 if inputs have a static scale; else the scale is dynamic
scaled_fp8        see `mezzotint.formats.scaled_fp8`

INT8 layers with `convrot`, W4A4 and W4A8 layers are rotated: groups of 256 columns, or as many as
the entry states, are multiplied by a regular Hadamard matrix.

ModelOpt's "ComfyUI" post-processing writes the same metadata over low-nibble-first codes. It leaves
its own `quantization_config` in the header, which identifies its files.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mezzotint.families.naming_scheme import transformer_prefix
from mezzotint.formats.comfy_layers import LAYERS, linear_from_config
from mezzotint.formats.comfy_metadata import MARKER, layer_configs, marker_tensors, trim_padding
from mezzotint.formats.components import COMFY_METADATA
from mezzotint.formats.contents import Contents, Match, NoMatch, classify_tensors
from mezzotint.formats.detection.evidence import (
    TILES,
    assume_code_order,
    detect_scale_layout,
    with_layouts,
)
from mezzotint.formats.header import Header
from mezzotint.formats.readers import modelopt
from mezzotint.formats.scaled_fp8 import (
    SCALED_FP8_MARKER,
    legacy_marker,
    scaled_linears,
    unwanted_input_scales,
)
from mezzotint.untrusted.json import parse_object

BFL_FORMATS = {"nvfp4", "float8_e4m3fn"}
HIGH_FIRST_EVIDENCE = (
    "codes high first: as comfy-kitchen writes nvfp4, not verified (other tools write low-first "
    "codes with the same metadata; a BF16 base would show it)"
)
LOW_FIRST_EVIDENCE = (
    "codes low first: as ModelOpt packs them; its quantization_config is in the header"
)


class Comfy:
    name = "comfy"
    title = "ComfyUI single file"

    def detect(self, header: Header) -> Match | NoMatch:
        if marks := comfy_evidence(header):
            return Match(marks)
        if COMFY_METADATA not in header.metadata:
            return NoMatch(
                f"no {COMFY_METADATA} in the header, no {MARKER} and no {SCALED_FP8_MARKER} tensor"
            )
        if modelopt_declaration(header):
            return Match(
                f"{COMFY_METADATA} and quantization_config in the header: written by ModelOpt"
            )
        if not has_bfl_names(header):
            return Match(f"{COMFY_METADATA} in the header")
        return NoMatch("its names are Black Forest Labs', and nothing else says ComfyUI")

    def contents(self, header: Header) -> Contents:
        declaration = modelopt_declaration(header)
        if declaration and legacy_marker(header) is None:
            found = modelopt.read_contents(header, declaration)
            tiled = with_layouts(found.linears, scales=TILES)
            linears = {module: trim_padding(header, linear) for module, linear in tiled.items()}
            return detect_scale_layout(
                header, replace(found, linears=linears, evidence=(LOW_FIRST_EVIDENCE,))
            )
        linears = {
            module: linear_from_config(header, module, config)
            for module, config in layer_configs(header).items()
        }
        ignored = marker_tensors(header) | unwanted_input_scales(header, linears)
        if legacy_marker(header) is not None:
            older, dropped = scaled_linears(header, linears)
            linears, ignored = linears | older, ignored | dropped
        found = classify_tensors(header, linears, ignored)
        return assume_code_order(detect_scale_layout(header, found), HIGH_FIRST_EVIDENCE)


FORMAT = Comfy()


def has_bfl_names(header: Header) -> bool:
    """Return whether blocks have the names of Black Forest Labs' own code."""
    return any(key.startswith(("double_blocks.", "single_blocks.")) for key in header.tensors)


def comfy_evidence(header: Header) -> str:
    """Return what only ComfyUI's files have, or an empty string."""
    if legacy := legacy_marker(header):
        return f"a tensor {legacy}"
    if found := marker_tensors(header):
        return f"{len(found)} {MARKER} tensors"
    if COMFY_METADATA not in header.metadata:
        return ""
    if prefix := transformer_prefix(header.tensors):
        return f"{COMFY_METADATA} in the header, and names that begin with {prefix}"
    formats = _comfy_only_formats(header)
    if not formats:
        return ""
    return f"{COMFY_METADATA} in the header, with layers in {' and '.join(formats)}"


def modelopt_declaration(header: Header) -> Mapping[str, Any]:
    """Return the flat configuration that ModelOpt's post-processing left in the header, or {}."""
    text = header.metadata.get("quantization_config", "")
    if '"modelopt"' not in text:
        return {}
    return {
        "file": "the header",
        **modelopt.flatten_declaration(parse_object(text, f"{header.path}: quantization_config")),
    }


def _comfy_only_formats(header: Header) -> list[str]:
    """Return the formats in the metadata that Black Forest Labs' files never have."""
    configs = layer_configs(header).values()
    names = {str(config.get("format")) for config in configs}
    rotated = ["convrot"] if any(config.get("convrot") for config in configs) else []
    return sorted(names & LAYERS.keys() - BFL_FORMATS) or rotated
