"""ComfyUI's metadata: one JSON object per quantized layer states the format of the layer.

The objects are in one of two places:

header   `_quantization_metadata`: {"layers": {"X": {"format": "nvfp4"}}}; some omit the prefix of X
tensor   X.comfy_quant, uint8: the JSON text

Source: https://github.com/Comfy-Org/ComfyUI/blob/0271a469fe29524fafe5872b737123d65a63e5fc/comfy/quant_ops.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mezzotint.containers import TensorInfo, read_all
from mezzotint.errors import BrokenFile
from mezzotint.families.naming_scheme import PREFIXES
from mezzotint.formats.components import COMFY_METADATA
from mezzotint.formats.contents import MAX_PADDING, StoredLinear
from mezzotint.formats.header import Header
from mezzotint.formats.readers.modelopt import SUFFIXES, optional_keys
from mezzotint.schemes import MXFP8, NVFP4, Scheme
from mezzotint.tensor import PLAIN, Layout
from mezzotint.untrusted.escaping import shown
from mezzotint.untrusted.json import parse_object

MARKER = ".comfy_quant"
MAX_MARKER = 64 * 2**10
MAX_MARKERS = 4 * 2**20
"""Bytes of one marker, and of all; a marker has about 100, and a model 1,000 markers."""
COMFY_LAYOUT = Layout(codes="high_first", scales="tiles_128x4")
"""The order in which comfy-kitchen writes 4-bit codes and block scales."""


def marker_tensors(header: Header) -> dict[str, str]:
    """Return {marker tensor: why it is not part of the model}."""
    return {key: "marker of the layer's format" for key in header.tensors if key.endswith(MARKER)}


def layer_configs(header: Header) -> dict[str, Mapping[str, Any]]:
    """Return {module in the file: its metadata}, from the header and from marker tensors.

    Raises   BrokenFile if one of them cannot be read, or both contradict each other
    """
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
        where = f"{info.file}: {info.name}"
        config = parse_object(bytes(text.flatten().tolist()), where, MAX_MARKER)
        module = _stored_name(header, info.name.removesuffix(MARKER))
        found[module] = _merged(found.get(module, {}), config, where)
    return found


def _merged(in_header: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what the header and a marker state together; one of them may omit keys."""
    for key in in_header.keys() & config.keys():
        if in_header[key] != config[key]:
            raise BrokenFile(
                f"{where} has {shown(key)} {shown(config[key])}, "
                f"and {COMFY_METADATA} in the header has {shown(in_header[key])}"
            )
    return {**in_header, **config}


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
