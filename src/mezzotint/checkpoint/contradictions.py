"""Report entries of a configuration that contradict the stored layers; such entries are ignored."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mezzotint.formats import Contents, Header
from mezzotint.schemes import MXFP8, NVFP4

HIGH_FIRST = {True: "high_first", False: "low_first"}
"""{swap_weight_nibbles: order of codes in the file}; SGLang swaps the codes of comfy-kitchen."""
SCALES = {"swizzled": "tiles_128x4", "linear": "row_major"}
"""{checkpoint_weight_scale_layout: order of block scales in the file}"""


def contradictions(header: Header, contents: Contents) -> Iterator[str]:
    """Yield a sentence for each entry of a configuration that contradicts the layers."""
    for where, declared in _declared(header):
        yield from (
            f"{where} has {entry}; the entry is ignored"
            for entry in _contradicting(declared, contents)
        )


def _contradicting(declared: Mapping[str, Any], contents: Contents) -> Iterator[str]:
    linears = contents.linears.values()
    codes = {linear.layout.codes for linear in linears if linear.scheme is NVFP4}
    scales = {linear.layout.scales for linear in linears if linear.scheme in (NVFP4, MXFP8)}
    groups = {linear.scheme.group for linear in linears if linear.scheme.group > 1}
    swap, order = (
        declared.get("swap_weight_nibbles"),
        declared.get("checkpoint_weight_scale_layout"),
    )
    if isinstance(swap, bool) and codes and codes != {HIGH_FIRST[swap]}:
        yield f"swap_weight_nibbles {swap}, but codes are {_join(codes)}"
    if isinstance(order, str) and order in SCALES and scales and scales != {SCALES[order]}:
        yield f"checkpoint_weight_scale_layout {order}, but scales are {_join(scales)}"
    size = declared.get("group_size")
    if type(size) is int and size > 0 and groups and size not in groups:
        yield f"group_size {size}, but groups have {' or '.join(map(str, sorted(groups)))} columns"


def _join(orders: set[str]) -> str:
    return " and ".join(order.replace("_", " ") for order in sorted(orders))


def _declared(header: Header) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (where, entries) of each declared quantization, with nested entries merged."""
    found = {
        "config.json": header.config.get("quantization_config"),
        "hf_quant_config.json": header.hf_quant_config,
        "the header": _object_in(header.metadata.get("quantization_config", "")),
    }
    for where, declared in found.items():
        if isinstance(declared, Mapping):
            nested = declared.get("quantization")
            yield where, {**declared, **nested} if isinstance(nested, Mapping) else declared


def _object_in(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
