"""Static input scales that a file leaves out and a sister file has."""

from dataclasses import replace

from mezzotint.errors import BadRequest
from mezzotint.formats.header import Header

INPUT_SCALE = ".input_scale"
LARGEST_SCALE = ".weight_scale_2", ".weight_scale"
"""Of these, those that are one number must be the same in both files."""


def with_scales_from(header: Header, sister: Header) -> Header:
    """The header with the input scales that only `sister` has, for the layers that both hold quantized alike.

    Raises  BadRequest if there is none to take, or if the two files' weights are not the same
    """
    taken = {
        key: info
        for key, info in sister.tensors.items()
        if key.endswith(INPUT_SCALE) and key not in header.tensors and _alike(header, sister, key)
    }
    if not taken:
        raise BadRequest(
            f"{sister.path}: has no input scale that {header.path} lacks for a layer quantized alike",
            "name the complete file of the same model, such as flux2-dev-nvfp4.safetensors beside its -mixed form.",
        )
    for key in taken:
        _check_same_weights(header, sister, key.removesuffix(INPUT_SCALE))
    note = f"{len(taken)} input scales are taken from {sister.path}"
    return replace(header, tensors={**header.tensors, **taken}, notes=(*header.notes, note))


def _alike(header: Header, sister: Header, key: str) -> bool:
    name = key.removesuffix(INPUT_SCALE) + ".weight"
    ours, theirs = header.tensors.get(name), sister.tensors.get(name)
    return ours is not None and theirs is not None and (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


def _check_same_weights(header: Header, sister: Header, module: str) -> None:
    for suffix in LARGEST_SCALE:
        ours, theirs = _number(header, module + suffix), _number(sister, module + suffix)
        if ours is not None and theirs is not None and ours != theirs:
            raise BadRequest(
                f"{module}{suffix} is {ours:g} in {header.path} and {theirs:g} in {sister.path}",
                "the two files hold different weights; their input scales cannot be exchanged.",
            )


def _number(header: Header, key: str) -> float | None:
    info = header.tensors.get(key)
    return info.read().item() if info is not None and info.shape in ((), (1,)) else None
