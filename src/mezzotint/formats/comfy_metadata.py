"""ComfyUI's metadata: one JSON object per quantized layer states the format of the layer.

The objects are in one of two places:

header   `_quantization_metadata`: {"layers": {"X": {"format": "nvfp4"}}}; some omit the prefix of X
tensor   X.comfy_quant, uint8: the JSON text

Source: https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/quant_ops.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mezzotint.containers import TensorInfo, read_all
from mezzotint.errors import BrokenFile, MissingTensor, UnreadFormat
from mezzotint.families.naming_scheme import PREFIXES
from mezzotint.formats.components import COMFY_METADATA
from mezzotint.formats.contents import MAX_PADDING, StoredLinear
from mezzotint.formats.header import Header
from mezzotint.formats.readers.modelopt import SUFFIXES, optional_keys
from mezzotint.schemes import FP8, INT8, MXFP8, NVFP4, Scheme
from mezzotint.tensor import PLAIN, Layout
from mezzotint.untrusted.escaping import shown
from mezzotint.untrusted.json import parse_object

MARKER = ".comfy_quant"
MAX_MARKER = 64 * 2**10
MAX_MARKERS = 4 * 2**20
"""Bytes of one marker, and of all; a marker has about 100, and a model 1,000 markers."""
SCHEME_OF_FORMAT = {"nvfp4": NVFP4, "float8_e4m3fn": FP8, "mxfp8": MXFP8, "int8_tensorwise": INT8}
UNSUPPORTED_FORMATS = {
    "float8_e5m2": "its numbers have two mantissa bits, and no scheme reads those",
    "convrot_w4a4": "its weights are rotated by Hadamard matrices",
    "asym_w4a8_int8": "its 4-bit weights have zero points",
    "int8_blockwise": "it has one scale per block, not per row",
    "awq_w4a16": "its packing of 4-bit weights is specific to ComfyUI",
}
COMFY_LAYOUT = Layout(codes="high_first", scales="tiles_128x4")
"""The order in which comfy-kitchen writes 4-bit codes and block scales."""


def marker_tensors(header: Header) -> dict[str, str]:
    """Return {marker tensor: why it is not part of the model}."""
    return {key: "marker of the layer's format" for key in header.tensors if key.endswith(MARKER)}


def layer_configs(header: Header) -> dict[str, Mapping[str, Any]]:
    """Return {module in the file: its metadata}, from the header and from marker tensors."""
    found: dict[str, Mapping[str, Any]] = {}
    if COMFY_METADATA in header.metadata:
        where = f"{header.path}: {COMFY_METADATA}"
        layers = parse_object(header.metadata[COMFY_METADATA], where).get("layers", {})
        if not isinstance(layers, dict) or not all(
            isinstance(config, dict) for config in layers.values()
        ):
            raise BrokenFile(f"{where} has layers that are not objects")
        found |= {_stored_name(header, module): config for module, config in layers.items()}
    markers = [header.tensors[key] for key in marker_tensors(header)]
    if not header.local:  # On the Hub, each marker that is read costs a request.
        markers = [info for info in markers if info.name.removesuffix(MARKER) not in found]
    _check_markers(markers)
    for info, text in zip(markers, read_all(markers), strict=True):
        found[info.name.removesuffix(MARKER)] = parse_object(
            bytes(text.flatten().tolist()), f"{info.file}: {info.name}", MAX_MARKER
        )
    return found


def _check_markers(infos: Sequence[TensorInfo]) -> None:
    """Refuse markers that are not bytes or are too large, before they are read whole."""
    for info in infos:
        if info.dtype != torch.uint8:
            raise BrokenFile(
                f"{info.file}: {info.name} is {info.dtype}, expected a marker in uint8"
            )
        if info.nbytes > MAX_MARKER:
            raise BrokenFile(
                f"{info.file}: {info.name} has {info.nbytes:,} bytes, "
                f"expected a marker of at most {MAX_MARKER:,}"
            )
    if (total := sum(info.nbytes for info in infos)) > MAX_MARKERS:
        raise BrokenFile(
            f"{infos[0].file}: its markers have {total:,} bytes in total, "
            f"expected at most {MAX_MARKERS:,}"
        )


def linear_from_config(header: Header, module: str, config: Mapping[str, Any]) -> StoredLinear:
    """Return the layer that an entry of the metadata describes, in comfy-kitchen's layout."""
    scheme = _scheme(header, module, config)
    if f"{module}.weight" not in header.tensors:
        raise MissingTensor(
            f"{header.path}: the metadata names layer {module}, and {module}.weight is not there"
        )
    full_precision = bool(config.get("full_precision_matrix_mult"))
    return comfy_kitchen_linear(header, module, scheme, dynamic=not full_precision)


def comfy_kitchen_linear(
    header: Header, module: str, scheme: Scheme, dynamic: bool = True
) -> StoredLinear:
    """Return a layer as comfy-kitchen writes it.

    dynamic   compute a missing input scale at each call; False keeps the input unquantized
    """
    keys = {part: module + suffix for part, suffix in SUFFIXES[scheme.name].items()}
    keys |= optional_keys(header, module, scheme)
    if not dynamic:
        keys.pop("input_scale", None)
    rows, columns = (*header.tensors[f"{module}.weight"].shape, 0, 0)[:2]
    layout = (
        COMFY_LAYOUT
        if scheme is NVFP4
        else Layout(scales="tiles_128x4")
        if scheme is MXFP8
        else PLAIN
    )
    shape = (rows, columns * 2 if scheme is NVFP4 else columns)
    return trim_padding(
        header, StoredLinear(module, scheme, layout, shape, keys, dynamic_input=dynamic)
    )


def trim_padding(header: Header, linear: StoredLinear) -> StoredLinear:
    """Return the linear with its true shape, as far as unpadded parts show it.

    comfy-kitchen and ModelOpt pad both sides of the codes to multiples of 16 or 32. The bias shows
    the true number of output features, and pre_quant_scale that of input features. Loading compares
    the shape with the model, which decides where these parts are absent.
    """
    if linear.scheme.group == 1:
        return linear
    lengths = [_length(header, linear.keys.get(part)) for part in ("bias", "pre_quant_scale")]
    rows, columns = (
        true if true is not None and 0 < stored - true < MAX_PADDING else stored
        for true, stored in zip(lengths, linear.shape, strict=True)
    )
    return replace(linear, shape=(rows, columns))


def _length(header: Header, key: str | None) -> int | None:
    """Return the length of a vector in the file, None for any other tensor."""
    info = header.tensors.get(key or "")
    return info.shape[0] if info is not None and len(info.shape) == 1 else None


def _stored_name(header: Header, module: str) -> str:
    """Return the module's name with the prefix that the tensors have."""
    names = (prefix + module for prefix in ("", *PREFIXES))
    return next((name for name in names if f"{name}.weight" in header.tensors), module)


def _scheme(header: Header, module: str, config: Mapping[str, Any]) -> Scheme:
    """Return the scheme of a layer's format. Raises UnreadFormat for a format that is not read."""
    name = str(config.get("format"))
    if name in UNSUPPORTED_FORMATS:
        raise UnreadFormat(
            f"{header.path}: layer {module} has format {name}: {UNSUPPORTED_FORMATS[name]}"
        )
    if config.get("convrot"):
        found = (
            f"format {name} with convrot"
            if "format" in config
            else "convrot and no format (INT8-Fast)"
        )
        raise UnreadFormat(f"{header.path}: layer {module} has {found}: its weights are rotated")
    if name not in SCHEME_OF_FORMAT:
        raise UnreadFormat(
            f"{header.path}: layer {module} has format {shown(name)}, "
            f"expected {' or '.join(SCHEME_OF_FORMAT)}"
        )
    return SCHEME_OF_FORMAT[name]
