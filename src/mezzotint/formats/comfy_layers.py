"""The layers of ComfyUI's formats, from an entry of the metadata to a StoredLinear.

docs/formats/comfy.md lists the tensors of each format. `LAYERS` has one function for each.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from mezzotint.errors import MissingTensor, ShapeMismatch, UnreadFormat, Unsupported
from mezzotint.formats.blocks import infer_block, linear_in_blocks
from mezzotint.formats.comfy_config import LayerConfig, read_config
from mezzotint.formats.comfy_metadata import comfy_kitchen_linear
from mezzotint.formats.contents import StoredLinear
from mezzotint.formats.header import Header
from mezzotint.formats.readers.modelopt import optional_keys
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
    Scheme,
)
from mezzotint.schemes.rotation import regular_hadamard
from mezzotint.schemes.w4a8 import GROUPS
from mezzotint.tensor import Layout
from mezzotint.untrusted.escaping import shown

PACKED = Layout(codes="low_first_int8")
AWQ_LAYOUT = Layout(codes="low_first_int8", scales="by_group")
"""comfy-kitchen stores packed 4-bit codes as signed bytes, low nibble first."""
SUFFIXES: Mapping[str, Mapping[str, str]] = {
    FP8_E5M2.name: {"codes": ".weight", "weight_scale": ".weight_scale"},
    INT4_ROWS.name: {"codes": ".weight", "weight_scale": ".weight_scale"},
    INT4_ROWS_A8.name: {"codes": ".weight", "weight_scale": ".weight_scale"},
    AWQ_CENTERED.name: {
        "codes": ".weight",
        "block_scale": ".weight_scale",
        "block_zero": ".weight_zeros",
    },
    W4A8.name: {
        "codes": ".weight",
        "block_scale": ".weight_s_rel",
        "channel_scale": ".weight_s_channel",
    },
    W6A8.name: {
        "codes": ".weight",
        "block_scale": ".weight_s_rel",
        "channel_scale": ".weight_s_channel",
    },
}
CODEBOOK, CORRECTION, SCALE = ".weight_codebook", ".weight_correction", ".weight_scale"
ROTATES = {"int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"}
GROUPED = {"nvfp4": (16,), "mxfp8": (32,), "awq_w4a16": (64,), "asym_w4a8_int8": GROUPS}
"""{format: the group sizes that are read}"""
BLOCKS = ("float8_e4m3fn_blockwise", "int8_blockwise")
"""Formats with a scale for each square block, whose side the entry states as `group_size`."""


def linear_from_config(header: Header, module: str, entries: Mapping[str, Any]) -> StoredLinear:
    """Return the layer that an entry of the metadata describes.

    Raises   UnreadFormat, MissingTensor, ShapeMismatch
    """
    where = f"{header.path}: layer {module}"
    config = read_config(entries, where)
    form = _format(header, module, config, where)
    if f"{module}.weight" not in header.tensors:
        raise MissingTensor(
            f"{header.path}: the metadata names layer {module}, and {module}.weight is not there"
        )
    _check_keys_fit(form, config, where)
    linear = LAYERS[form](header, module, config)
    if config.shape not in (None, linear.shape):
        raise ShapeMismatch(
            f"{where} has the shape {list(linear.shape)}, "
            f"and its metadata states {list(config.shape or ())}"
        )
    return linear


def _format(header: Header, module: str, config: LayerConfig, where: str) -> str:
    """Return the key of `LAYERS` that an entry names or implies."""
    if config.format is None:
        weight = header.tensors.get(f"{module}.weight")
        # The INT8-Fast extension wrote {"convrot": true, "convrot_groupsize": 256} alone.
        if config.convrot and weight is not None and weight.dtype is torch.int8:
            return "int8_tensorwise"
    elif config.format in LAYERS:
        return config.format
    raise UnreadFormat(
        f"{where} has format {shown(str(config.format))}, expected {' or '.join(LAYERS)}"
    )


def _check_keys_fit(form: str, config: LayerConfig, where: str) -> None:
    """Refuse what a format has no meaning for, and what ComfyUI therefore ignores."""
    if config.convrot and form not in ROTATES:
        raise UnreadFormat(
            f"{where} has format {form} with convrot, and no ComfyUI rotates the inputs of that"
        )
    groups = GROUPED.get(form, ())
    if config.group is not None and form not in BLOCKS and config.group not in groups:
        expected = " or ".join(map(str, groups)) or "none"
        raise UnreadFormat(
            f"{where} has format {form} with group_size {config.group}, expected {expected}"
        )
    if form == "mxfp8" and config.full_precision:
        raise UnreadFormat(
            f"{where} has format mxfp8 with full_precision_matrix_mult, "
            "and MXFP8 layers always quantize their inputs here"
        )


def _kitchen(scheme: Scheme) -> Callable[[Header, str, LayerConfig], StoredLinear]:
    """Return the builder of a format that stores its parts as `comfy_kitchen_linear` says."""

    def build(header: Header, module: str, config: LayerConfig) -> StoredLinear:
        linear = comfy_kitchen_linear(header, module, scheme, dynamic=not config.full_precision)
        return linear if config.shape is None else _with_stated_shape(linear, config.shape)

    return build


def _with_stated_shape(linear: StoredLinear, shape: tuple[int, int]) -> StoredLinear:
    """Return the layer with the shape that its entry states, if padding explains the difference."""
    return replace(linear, shape=shape) if linear.may_be_padded_from(shape) else linear


def _blocks(header: Header, module: str, config: LayerConfig) -> StoredLinear:
    """Return a layer in square blocks, whose input stays unquantized."""
    scale = f"{module}{SCALE}"
    side = config.group
    block = (side, side) if side is not None else infer_block(header, module, scale)
    return linear_in_blocks(header, module, scale, block)


def _int8(header: Header, module: str, config: LayerConfig) -> StoredLinear:
    linear = comfy_kitchen_linear(header, module, INT8, dynamic=not config.full_precision)
    return _rotated(header, linear, config.rotation) if config.convrot else linear


def e5m2_linear(header: Header, module: str, _config: LayerConfig | None = None) -> StoredLinear:
    """Return an FP8 layer in e5m2, whose input always stays unquantized."""
    return _linear(header, module, FP8_E5M2, Layout(), dynamic=False)


def _w4a4(header: Header, module: str, config: LayerConfig) -> StoredLinear:
    scheme = INT4_ROWS if config.linear_dtype == "int4" else INT4_ROWS_A8
    linear = _linear(header, module, scheme, PACKED, not config.full_precision)
    return _rotated(header, linear, config.rotation)


def _w4a8(header: Header, module: str, config: LayerConfig) -> StoredLinear:
    if module + CORRECTION in header.tensors:
        raise UnreadFormat(
            f"{header.path}: layer {module} has {module + CORRECTION}: "
            "its codes are asymmetric, and ComfyUI does not read those either"
        )
    group = config.group or GROUPS[0]
    scales = header.tensors.get(f"{module}.weight_s_rel")
    weight = header.tensors[f"{module}.weight"].shape
    # Codes have 4 or 6 bits; the entry does not say so, and the number of groups does.
    columns = scales.shape[1] * group if scales is not None and len(scales.shape) == 2 else 0
    six_bits = columns > 0 and len(weight) == 2 and weight[1] * 8 == columns * 6
    scheme = W6A8 if six_bits else W4A8
    linear = _linear(header, module, scheme, PACKED, not config.full_precision)
    _check_group(header, linear, columns, group)
    if module + CODEBOOK in header.tensors:
        linear = replace(linear, keys={**linear.keys, "codebook": module + CODEBOOK})
    return _rotated(header, linear, config.rotation)


def _check_group(header: Header, linear: StoredLinear, columns: int, group: int) -> None:
    """Refuse scales of another number of groups than the entry states."""
    if columns and columns != linear.shape[1]:
        key = linear.keys["block_scale"]
        found = list(header.tensors[key].shape)
        raise ShapeMismatch(
            f"{header.tensors[key].file.name}: {key} has shape {found}, expected "
            f"{[linear.shape[0], linear.shape[1] // group]} ({group} columns share a scale)"
        )


def _awq(header: Header, module: str, _config: LayerConfig) -> StoredLinear:
    return _linear(header, module, AWQ_CENTERED, AWQ_LAYOUT, dynamic=False)


def _linear(
    header: Header, module: str, scheme: Scheme, layout: Layout, dynamic: bool
) -> StoredLinear:
    """Return a layer with the parts of `SUFFIXES`; its shape follows from the packed codes."""
    keys = {part: module + suffix for part, suffix in SUFFIXES[scheme.name].items()}
    keys |= optional_keys(header, module, scheme)
    if not dynamic:
        keys.pop("input_scale", None)
    rows, columns = (*header.tensors[f"{module}.weight"].shape, 0, 0)[:2]
    shape = (rows, columns * 8 // scheme.bits)
    return StoredLinear(module, scheme, layout, shape, keys, dynamic_input=dynamic)


def _rotated(header: Header, linear: StoredLinear, size: int) -> StoredLinear:
    """Return the layer with the signs of its rotation.

    Raises   UnreadFormat for a size that has no such matrix; ShapeMismatch
    """
    where = f"{header.path}: layer {linear.module}"
    try:
        signs = regular_hadamard(size)
    except Unsupported as error:
        raise UnreadFormat(f"{where}: {error.message}") from error
    if linear.shape[1] % size:
        raise ShapeMismatch(
            f"{where} has {linear.shape[1]} input features, "
            f"expected a multiple of convrot_groupsize {size}"
        )
    return replace(linear, implied_values={**linear.implied_values, "rotation": signs})


LAYERS: Mapping[str, Callable[[Header, str, LayerConfig], StoredLinear]] = {
    "nvfp4": _kitchen(NVFP4),
    "float8_e4m3fn": _kitchen(FP8),
    "float8_e4m3fn_rowwise": _kitchen(FP8),
    "float8_e4m3fn_blockwise": _blocks,
    "int8_blockwise": _blocks,
    "mxfp8": _kitchen(MXFP8),
    "int8_tensorwise": _int8,
    "float8_e5m2": e5m2_linear,
    "convrot_w4a4": _w4a4,
    "asym_w4a8_int8": _w4a8,
    "awq_w4a16": _awq,
}
