"""Black Forest Labs' quantized files: their own names, comfy-kitchen's layout, one file.

NVFP4   X.weight u8 [out, in/2] high nibble first,  X.weight_scale e4m3 in 128x4 tiles,  X.weight_scale_2 f32 [] or [1]
FP8     X.weight e4m3 [out, in],  X.weight_scale f32 [] or [1]
both    X.input_scale f32 [] or [1], which the `-mixed` files leave out for some quantized layers

q, k and v are one layer, as are all that a single block's input feeds. The family gives diffusers' names. A layer is
quantized if its tensors are; the notes in the header, where there are any, must agree.
"""

from collections.abc import Mapping

import torch

from mezzotint.errors import UnknownFormat
from mezzotint.formats.cast import FORMAT as CAST
from mezzotint.formats.comfy import comfy_marks, has_bfl_names, modelopt_declaration
from mezzotint.formats.components import COMFY_NOTE
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, sort_out
from mezzotint.formats.header import Header
from mezzotint.formats.layout_evidence import assume_codes, settle_scales
from mezzotint.formats.notes import SCHEME_OF_FORMAT, kitchen_linear, notes
from mezzotint.formats.safetensors_file import TensorInfo
from mezzotint.schemes import FP8, NVFP4

SCHEME_OF_DTYPE = {torch.float8_e4m3fn: FP8, torch.uint8: NVFP4}
INPUT_SCALE = ".input_scale"
NOTED = "codes high first: as comfy-kitchen writes the nvfp4 of the header's notes, not verified"
BY_NAME = "codes high first: assumed from the names alone, as in Black Forest Labs' published files"


class BFL:
    name = "bfl"
    title = "Black Forest Labs single file"

    def detect(self, header: Header) -> Match | NoMatch:
        if not has_bfl_names(header):
            return NoMatch("no double_blocks or single_blocks among its names")
        if comfy_marks(header) or modelopt_declaration(header):
            return NoMatch("has Black Forest Labs' names, and the marks of ComfyUI's files")
        if isinstance(CAST.detect(header), Match):
            return NoMatch("has Black Forest Labs' names, and weights cast to FP8 without scales")
        quantized = [info for info in header.tensors.values() if _is_quantized(info)]
        if not quantized:
            return NoMatch("has Black Forest Labs' names, and no quantized weight")
        return Match(
            f"Black Forest Labs' names, and {len(quantized)} weights of FP8 or FP4, such as {quantized[0].name}"
        )

    def contents(self, header: Header) -> Contents:
        linears = {
            info.name.removesuffix(".weight"): kitchen_linear(
                header, info.name.removesuffix(".weight"), SCHEME_OF_DTYPE[info.dtype]
            )
            for info in header.tensors.values()
            if _is_quantized(info)
        }
        _check_notes(header, linears)
        found = settle_scales(header, sort_out(header, linears, _orphans(header)))
        return assume_codes(found, NOTED if COMFY_NOTE in header.metadata else BY_NAME)


FORMAT = BFL()


def _is_quantized(info: TensorInfo) -> bool:
    return info.name.endswith(".weight") and info.dtype in SCHEME_OF_DTYPE


def _check_notes(header: Header, linears: Mapping[str, StoredLinear]) -> None:
    for module, note in notes(header).items():
        written = str(note.get("format"))
        found = linears[module].scheme if module in linears else None
        if SCHEME_OF_FORMAT.get(written) is not found:
            raise UnknownFormat(
                f"{header.path}: the header's note says that {module} is {written}, "
                f"and its weight is {found.title if found else 'not quantized'}",
                "the header is from another export; download the file again.",
            )


def _orphans(header: Header) -> dict[str, str]:
    """Input scales of layers that are not quantized, which the `-mixed` files keep."""
    found = {}
    for key in header.tensors:
        weight = header.tensors.get(key.removesuffix(INPUT_SCALE) + ".weight")
        if key.endswith(INPUT_SCALE) and weight is not None and not _is_quantized(weight):
            found[key] = "input scale of a layer that is not quantized"
    return found
