"""Read LightX2V's quantized files: one scale per row, and nothing that declares the format.

FP8    X.weight e4m3 [out, in],  X.weight_scale f32 or bf16 [out, 1]
INT8   X.weight i8 [out, in],    X.weight_scale f32 or bf16 [out, 1]

Inputs are quantized with a scale per token. Source: tools/convert of
https://github.com/ModelTC/LightX2V
"""

from collections.abc import Iterator, Mapping

import torch

from mezzotint.containers import DType, TensorInfo
from mezzotint.formats.comfy_metadata import comfy_kitchen_linear
from mezzotint.formats.components import COMFY_METADATA
from mezzotint.formats.contents import Contents, Match, NoMatch, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.formats.readers import modelopt
from mezzotint.formats.readers.comfy import comfy_evidence, has_bfl_names
from mezzotint.schemes import FP8, INT8, Scheme
from mezzotint.schemes.scheme import FLOAT_DTYPES

SCHEME_OF_DTYPE: Mapping[DType, Scheme] = {torch.float8_e4m3fn: FP8, torch.int8: INT8}
SCALE = ".weight_scale"
DECLARATIONS = ("quantization_config", COMFY_METADATA)


class LightX2V:
    name = "lightx2v"
    title = "LightX2V"

    def detect(self, header: Header) -> Match | NoMatch:
        if (reason := next(_reasons_against(header), None)) is not None:
            return NoMatch(reason)
        return Match(
            f"{len(_matrices(header))} matrices in FP8 or INT8 with one scale per row "
            "[out, 1], and nothing declares another format"
        )

    def contents(self, header: Header) -> Contents:
        linears = {
            module: comfy_kitchen_linear(header, module, scheme)
            for module, scheme in _matrices(header).items()
        }
        return classify_tensors(header, linears, {})


FORMAT = LightX2V()


def _matrices(header: Header) -> dict[str, Scheme]:
    """Return {module: scheme} of the quantized matrices."""
    return {
        info.name.removesuffix(".weight"): SCHEME_OF_DTYPE[info.dtype]
        for info in header.tensors.values()
        if info.name.endswith(".weight") and info.dtype in SCHEME_OF_DTYPE
    }


def _reasons_against(header: Header) -> Iterator[str]:
    """Yield reasons why the file is not LightX2V's, by its header."""
    matrices = _matrices(header)
    if not matrices:
        yield "no weight is in e4m3 or int8"
    for module in matrices:
        weight, scale = header.tensors[f"{module}.weight"], header.tensors.get(module + SCALE)
        if not _is_per_row(weight, scale):
            yield f"{module}{SCALE} is not [out, 1]"
        if f"{module}.input_scale" in header.tensors:
            yield f"{module}.input_scale is there, and inputs have no static scale"
    if has_bfl_names(header):
        yield "its names are Black Forest Labs'"
    if comfy_evidence(header):
        yield "it has the metadata of ComfyUI's files"
    for where, entries in (("config.json", header.config), ("the header", header.metadata)):
        yield from (f"{where} has {key}" for key in DECLARATIONS if key in entries)
    if modelopt.declared_quantization(header):
        yield "a quantization by ModelOpt is declared"


def _is_per_row(weight: TensorInfo, scale: TensorInfo | None) -> bool:
    return (
        scale is not None
        and scale.dtype in FLOAT_DTYPES
        and len(weight.shape) == 2
        and scale.shape == (weight.shape[0], 1)
    )
