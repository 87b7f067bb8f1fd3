"""Read Black Forest Labs' quantized files: original names, one file.

NVFP4   X.weight u8 [out, in/2] high nibble first,  X.weight_scale e4m3 in 128x4 tiles,
        X.weight_scale_2 f32 [] or [1]
        FLUX.3: low nibble first,  X.weight_scale e4m3 [out, in/16]
FP8     X.weight e4m3 [out, in],  X.weight_scale f32 [] or [1]
        FLUX.3 (`fp8r`): X.weight_scale f32 [out]
both    X.input_scale f32 [] or [1], which `-mixed` files and `fp8r` omit

q, k and v are one layer, as are all linears with the input of a single block; FLUX.3 fuses none.
The family maps names to diffusers'. The tensors show which layers are quantized; metadata in the
header must agree. FLUX.3's forms: `BFLQuantizationConfig` of diffusers 0.42, which reads them for
any model.
"""

from collections.abc import Mapping

import torch

from mezzotint.containers import DType, TensorInfo
from mezzotint.errors import UnknownFormat
from mezzotint.formats.comfy_metadata import comfy_kitchen_linear, layer_configs
from mezzotint.formats.components import COMFY_METADATA
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.detection.evidence import (
    ROWS,
    assume_code_order,
    detect_scale_layout,
    with_layouts,
)
from mezzotint.formats.header import Header
from mezzotint.formats.readers.comfy import comfy_evidence, has_bfl_names, modelopt_declaration
from mezzotint.formats.readers.fp8_cast import FORMAT as FP8_CAST
from mezzotint.schemes import FP8, NVFP4, Scheme

SCHEME_OF_DTYPE: Mapping[DType, Scheme] = {torch.float8_e4m3fn: FP8, torch.uint8: NVFP4}
SCHEME_OF_FORMAT = {"float8_e4m3fn": FP8, "nvfp4": NVFP4}
INPUT_SCALE = ".input_scale"
METADATA_EVIDENCE = (
    "codes high first: as comfy-kitchen writes the nvfp4 of the header's metadata, not verified"
)
NAME_EVIDENCE = (
    "codes high first: assumed from the names alone, as in Black Forest Labs' published files"
)
FLUX3 = "early_stream_modulations."
"""What the names of modulation layers begin with in FLUX.3, and in no earlier model."""


class BFL:
    name = "bfl"
    title = "Black Forest Labs single file"

    def detect(self, header: Header) -> Match | NoMatch:
        if not has_bfl_names(header):
            return NoMatch("no double_blocks or single_blocks among its names")
        if comfy_evidence(header) or modelopt_declaration(header):
            return NoMatch("has Black Forest Labs' names, and the metadata of ComfyUI's files")
        if isinstance(FP8_CAST.detect(header), Match):
            return NoMatch("has Black Forest Labs' names, and weights cast to FP8 without scales")
        quantized = [info for info in header.tensors.values() if _is_quantized(info)]
        if not quantized:
            return NoMatch("has Black Forest Labs' names, and no quantized weight")
        return Match(
            f"Black Forest Labs' names, and {len(quantized)} weights of FP8 or FP4, "
            f"such as {quantized[0].name}"
        )

    def contents(self, header: Header) -> Contents:
        linears = {
            info.name.removesuffix(".weight"): comfy_kitchen_linear(
                header, info.name.removesuffix(".weight"), SCHEME_OF_DTYPE[info.dtype]
            )
            for info in header.tensors.values()
            if _is_quantized(info)
        }
        _check_metadata(header, linears)
        if any(name.startswith(FLUX3) for name in header.tensors):
            linears = with_layouts(linears, scales=ROWS)
        found = detect_scale_layout(
            header, classify_tensors(header, linears, _unused_input_scales(header))
        )
        return assume_code_order(
            found, METADATA_EVIDENCE if COMFY_METADATA in header.metadata else NAME_EVIDENCE
        )


FORMAT = BFL()


def _is_quantized(info: TensorInfo) -> bool:
    return info.name.endswith(".weight") and info.dtype in SCHEME_OF_DTYPE


def _check_metadata(header: Header, linears: Mapping[str, StoredLinear]) -> None:
    """Raise UnknownFormat if the header's metadata contradicts the tensors."""
    for module, config in layer_configs(header).items():
        name = str(config.get("format"))
        found = linears[module].scheme if module in linears else None
        if SCHEME_OF_FORMAT.get(name) is not found:
            raise UnknownFormat(
                f"{header.path}: the header's metadata says that {module} is {name}, "
                f"and its weight is {found.title if found else 'not quantized'}",
                "the header is from another export; download the file again.",
            )


def _unused_input_scales(header: Header) -> dict[str, str]:
    """Return {input scale of an unquantized layer: reason}; `-mixed` files keep these."""
    found = {}
    for key in header.tensors:
        weight = header.tensors.get(key.removesuffix(INPUT_SCALE) + ".weight")
        if key.endswith(INPUT_SCALE) and weight is not None and not _is_quantized(weight):
            found[key] = "input scale of a layer that is not quantized"
    return found
