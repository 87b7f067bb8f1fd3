"""One layer's entry of ComfyUI's metadata, checked: an unknown key or value is an error.

ComfyUI ignores keys that it does not know. A key that a newer version or another tool adds may
change what the weights mean, so Mezzotint refuses it by name.
Source: https://github.com/Comfy-Org/ComfyUI/blob/0271a469fe29524fafe5872b737123d65a63e5fc/comfy/ops.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mezzotint.errors import UnreadFormat, join_names
from mezzotint.untrusted.escaping import shown

DEFAULT_ROTATION = 256
FLAGS = {"full_precision_matrix_mult", "convrot", "per_row"}
NUMBERS = {"convrot_groupsize", "group_size"}
DESCRIPTIONS = {"format", "linear_dtype", "orig_dtype", "orig_shape"}
"""Keys of ComfyUI, and those of convert_to_quant: per_row, orig_dtype, orig_shape."""
LINEAR_DTYPES = ("int4", "int8")


@dataclass(frozen=True)
class LayerConfig:
    """What a layer's entry states.

    format           name of the format; None in the entries of the INT8-Fast extension
    full_precision   leave the layer's input unquantized
    convrot          the columns of the weight are rotated
    rotation         columns that are rotated together
    group            columns that share a scale; None if the entry does not state it
    linear_dtype     "int4" or "int8": what a W4A4 layer quantizes its input to
    shape            (out, in) before padding; None if the entry does not state it
    """

    format: str | None
    full_precision: bool = False
    convrot: bool = False
    rotation: int = DEFAULT_ROTATION
    group: int | None = None
    linear_dtype: str = "int4"
    shape: tuple[int, int] | None = None


def read_config(entries: Mapping[str, Any], where: str) -> LayerConfig:
    """Check one entry; `where` names the file and the layer. Raises UnreadFormat."""
    nested = entries.get("params", {})
    if not isinstance(nested, dict):
        raise _unread(where, "params", nested)
    # Earlier versions of convert_to_quant nested the parameters, and ComfyUI still reads those.
    said = {**nested, **{key: value for key, value in entries.items() if key != "params"}}
    if unknown := said.keys() - FLAGS - NUMBERS - DESCRIPTIONS:
        raise UnreadFormat(
            f"{where} has {join_names(sorted(map(shown, unknown)))} in its metadata, "
            "which is not known, and may change what its weights mean",
            "a newer Mezzotint may read it.",
        )
    _check_types(said, where)
    return LayerConfig(
        format=said.get("format"),
        full_precision=said.get("full_precision_matrix_mult", False),
        convrot=said.get("convrot", False),
        rotation=said.get("convrot_groupsize", DEFAULT_ROTATION),
        group=said.get("group_size"),
        linear_dtype=said.get("linear_dtype", LINEAR_DTYPES[0]),
        shape=_shape(said, where),
    )


def _check_types(said: Mapping[str, Any], where: str) -> None:
    """Raise UnreadFormat for a value of a type, or with a meaning, that is not known."""
    for key, value in said.items():
        if key in FLAGS and not isinstance(value, bool):
            raise _unread(where, key, value)
        if key in NUMBERS and (type(value) is not int or value < 1):
            raise _unread(where, key, value)
    if not isinstance(said.get("format"), str | None):
        raise _unread(where, "format", said["format"])
    if said.get("linear_dtype", LINEAR_DTYPES[0]) not in LINEAR_DTYPES:
        raise _unread(where, "linear_dtype", said["linear_dtype"])


def _shape(said: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    sides = said.get("orig_shape")
    if sides is None:
        return None
    if (
        not isinstance(sides, list)
        or len(sides) != 2
        or not all(type(side) is int for side in sides)
    ):
        raise _unread(where, "orig_shape", sides)
    return sides[0], sides[1]


def _unread(where: str, key: str, value: object) -> UnreadFormat:
    return UnreadFormat(f"{where} has {key} {shown(value)} in its metadata, which is not read")
