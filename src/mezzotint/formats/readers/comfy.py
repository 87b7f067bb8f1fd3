"""Read ComfyUI's single files: metadata for each quantized layer, or the older `scaled_fp8`.

nvfp4             X.weight u8 [out, in/2] high nibble first,  X.weight_scale e4m3 in 128x4 tiles,
                  X.weight_scale_2 f32
float8_e4m3fn     X.weight e4m3 [out, in],  X.weight_scale f32
mxfp8             X.weight e4m3 [out, in],  X.weight_scale e8m0 in 128x4 tiles
int8_tensorwise   X.weight i8 [out, in],  X.weight_scale f32 for the matrix or per row
all               X.input_scale f32 if inputs have a static scale; else the scale is dynamic
scaled_fp8        X.weight e4m3,  X.scale_weight f32,  X.scale_input f32
                  A tensor `scaled_fp8` of two elements requests unquantized inputs.
                  A scale_input of 1.0 means that there is none.

ModelOpt's "ComfyUI" post-processing writes the same metadata over low-nibble-first codes. It leaves
its own `quantization_config` in the header, which identifies its files.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mezzotint.containers import TensorInfo
from mezzotint.families.naming_scheme import PREFIXES
from mezzotint.formats.comfy_metadata import (
    MARKER,
    SCHEME_OF_FORMAT,
    UNSUPPORTED_FORMATS,
    comfy_kitchen_linear,
    layer_configs,
    linear_from_config,
    marker_tensors,
    trim_padding,
)
from mezzotint.formats.components import COMFY_METADATA
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.detection.evidence import (
    TILES,
    assume_code_order,
    detect_scale_layout,
    with_layouts,
)
from mezzotint.formats.header import Header
from mezzotint.formats.readers import modelopt
from mezzotint.schemes import FP8
from mezzotint.untrusted.json import parse_object

SCALED_FP8_MARKER = "scaled_fp8"
BFL_FORMATS = {"nvfp4", "float8_e4m3fn"}
FULL_PRECISION = "the file requests unquantized inputs"
LEGACY_SCALE_SUFFIXES = {"weight_scale": ".scale_weight", "input_scale": ".scale_input"}
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
        if legacy_marker(header) is not None:
            return _legacy_contents(header)
        declaration = modelopt_declaration(header)
        if declaration:
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
        found = classify_tensors(
            header, linears, marker_tensors(header) | _unwanted_input_scales(header, linears)
        )
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
    if prefix := _prefix(header):
        return f"{COMFY_METADATA} in the header, and names that begin with {prefix}"
    formats = _comfy_only_formats(header)
    if not formats:
        return ""
    return f"{COMFY_METADATA} in the header, with layers in {' and '.join(formats)}"


def legacy_marker(header: Header) -> str | None:
    """Return the name of the `scaled_fp8` tensor, or None."""
    return next(
        (
            prefix + SCALED_FP8_MARKER
            for prefix in ("", *PREFIXES)
            if prefix + SCALED_FP8_MARKER in header.tensors
        ),
        None,
    )


def modelopt_declaration(header: Header) -> Mapping[str, Any]:
    """Return the flat configuration that ModelOpt's post-processing left in the header, or {}."""
    text = header.metadata.get("quantization_config", "")
    if '"modelopt"' not in text:
        return {}
    return {
        "file": "the header",
        **modelopt.flatten_declaration(parse_object(text, f"{header.path}: quantization_config")),
    }


def _prefix(header: Header) -> str:
    """Return the prefix that ComfyUI's files put before the names, or an empty string."""
    return next(
        (prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in header.tensors)), ""
    )


def _comfy_only_formats(header: Header) -> list[str]:
    """Return the formats in the metadata that Black Forest Labs' files never have."""
    names = {str(config.get("format")) for config in layer_configs(header).values()}
    return sorted(names & (SCHEME_OF_FORMAT.keys() | UNSUPPORTED_FORMATS) - BFL_FORMATS)


def _unwanted_input_scales(header: Header, linears: Mapping[str, StoredLinear]) -> dict[str, str]:
    """Return {input scale: reason} of layers whose metadata requests unquantized inputs."""
    keys = (
        f"{module}.input_scale"
        for module, linear in linears.items()
        if not linear.quantizes_activation
    )
    return dict.fromkeys((key for key in keys if key in header.tensors), FULL_PRECISION)


def _legacy_contents(header: Header) -> Contents:
    marker = str(legacy_marker(header))
    full_precision = header.tensors[marker].shape == (2,)
    linears, ignored = {}, {marker: "marker of the file's format"}
    for info in header.tensors.values():
        if info.name.endswith(".weight") and info.dtype is torch.float8_e4m3fn:
            linear, dropped = _legacy_linear(
                header, info.name.removesuffix(".weight"), not full_precision
            )
            linears[linear.module] = linear
            ignored |= dropped
    return classify_tensors(header, linears, ignored)


def _is_one(info: TensorInfo) -> bool:
    return info.shape in ((), (1,)) and info.read().flatten().tolist() == [1.0]


def _legacy_linear(
    header: Header, module: str, quantize: bool
) -> tuple[StoredLinear, dict[str, str]]:
    """Return the layer, and its input scale if that is ignored: {key: reason}."""
    linear = comfy_kitchen_linear(header, module, FP8, quantize)
    scale, input_scale = (module + suffix for suffix in LEGACY_SCALE_SUFFIXES.values())
    keys = {**linear.keys, "weight_scale": scale}
    dropped = {}
    if input_scale in header.tensors:
        if not quantize:
            dropped[input_scale] = FULL_PRECISION
        elif _is_one(header.tensors[input_scale]):
            dropped[input_scale] = "an input scale of 1.0 means that there is none"
        else:
            keys["input_scale"] = input_scale
    return replace(linear, keys=keys), dropped
