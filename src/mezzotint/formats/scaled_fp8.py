"""ComfyUI's older FP8 files: a tensor `scaled_fp8` instead of metadata for each layer.

X.weight e4m3 or e5m2 [out, in],  X.scale_weight f32,  X.scale_input f32

A `scaled_fp8` of two elements requests unquantized inputs. A scale_input of 1.0 means that there is
none. Some converters name the scales as newer files do: X.weight_scale and X.input_scale.

musubi-tuner saves a scale for each row and group of columns: X.scale_weight [out, in/group, 1].
Source: https://github.com/kohya-ss/musubi-tuner (modules/fp8_optimization_utils.py)
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from mezzotint.containers import TensorInfo
from mezzotint.families.naming_scheme import PREFIXES
from mezzotint.formats.blocks import has_block_scales, infer_block, linear_in_blocks
from mezzotint.formats.comfy_layers import e5m2_linear
from mezzotint.formats.comfy_metadata import comfy_kitchen_linear
from mezzotint.formats.contents import StoredLinear
from mezzotint.formats.header import Header
from mezzotint.schemes import FP8
from mezzotint.schemes.scheme import FP8_DTYPES

SCALED_FP8_MARKER = "scaled_fp8"
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
INPUT_SCALES = (".scale_input", ".input_scale")
BLOCK_SCALES = (*WEIGHT_SCALES, ".weight_scale_inv")
FULL_PRECISION = "the file requests unquantized inputs"
NEVER_QUANTIZED = "inputs of layers in this format are not quantized"
NO_SCALE = "an input scale of 1.0 means that there is none"


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


def unwanted_input_scales(header: Header, linears: Mapping[str, StoredLinear]) -> dict[str, str]:
    """Return {input scale: reason} of layers whose inputs are not quantized."""
    return {
        f"{module}.input_scale": FULL_PRECISION
        if linear.scheme.quantize_activation
        else NEVER_QUANTIZED
        for module, linear in linears.items()
        if not linear.quantizes_activation and f"{module}.input_scale" in header.tensors
    }


def scaled_linears(
    header: Header, described: Collection[str]
) -> tuple[dict[str, StoredLinear], dict[str, str]]:
    """Return the FP8 layers without metadata, and {tensor that is ignored: reason}.

    described   layers that have metadata
    """
    marker = str(legacy_marker(header))
    full_precision = header.tensors[marker].shape == (2,)
    linears, ignored = {}, {marker: "marker of the file's format"}
    for info in header.tensors.values():
        module = info.name.removesuffix(".weight")
        if module == info.name or module in described:
            continue
        if (blocks := scaled_in_blocks(header, module)) is not None:
            linears[module] = blocks
        elif info.dtype in FP8_DTYPES:
            linears[module], dropped = _linear(header, module, info.dtype, not full_precision)
            ignored |= dropped
    return linears, ignored


def scaled_in_blocks(header: Header, module: str) -> StoredLinear | None:
    """Return an FP8 or INT8 layer with a scale for each block, or None for any other layer."""
    scale = _spelled(header, module, BLOCK_SCALES)
    if scale is None or not has_block_scales(header, module, scale):
        return None
    return linear_in_blocks(header, module, scale, infer_block(header, module, scale))


def _linear(
    header: Header, module: str, dtype: object, quantize: bool
) -> tuple[StoredLinear, dict[str, str]]:
    """Return the layer, and its input scale if that is ignored: {key: reason}."""
    linear = (
        e5m2_linear(header, module)
        if dtype is torch.float8_e5m2
        else comfy_kitchen_linear(header, module, FP8, quantize)
    )
    keys = {part: key for part, key in linear.keys.items() if part != "input_scale"}
    keys["weight_scale"] = _spelled(header, module, WEIGHT_SCALES) or module + WEIGHT_SCALES[0]
    input_scale, dropped = _spelled(header, module, INPUT_SCALES), {}
    if input_scale:
        if reason := _why_ignored(header.tensors[input_scale], linear, quantize):
            dropped[input_scale] = reason
        else:
            keys["input_scale"] = input_scale
    return replace(linear, keys=keys), dropped


def _spelled(header: Header, module: str, suffixes: Collection[str]) -> str | None:
    """Return the name under which a scale is stored, or None."""
    return next((module + suffix for suffix in suffixes if module + suffix in header.tensors), None)


def _why_ignored(info: TensorInfo, linear: StoredLinear, quantize: bool) -> str:
    """Return why an input scale is not used, or an empty string; reads a single number."""
    if linear.scheme.quantize_activation is None:
        return NEVER_QUANTIZED
    if not quantize:
        return FULL_PRECISION
    is_one = info.shape in ((), (1,)) and info.read().flatten().tolist() == [1.0]
    return NO_SCALE if is_one else ""
