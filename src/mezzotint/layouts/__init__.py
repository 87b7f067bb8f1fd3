"""Convert a quantized weight from one byte layout to another."""

import torch

from mezzotint.layouts.fp4 import swap_nibbles
from mezzotint.layouts.part_layouts import part_layout
from mezzotint.layouts.tiles import from_tiles, to_tiles
from mezzotint.schemes import ANY_RANK, Scheme, Shape
from mezzotint.tensor import PLAIN, Layout, QuantTensor

__all__ = [
    "convert",
    "from_tiles",
    "plain_dtype",
    "plain_shape",
    "stored_shapes",
    "swap_nibbles",
    "to_tiles",
]


def convert(tensor: QuantTensor, to: Layout) -> QuantTensor:
    """Return the weight in layout `to`; the conversion goes through the plain layout."""
    if tensor.layout == to:
        return tensor
    parts = {}
    for name, part in _to_plain(tensor).parts.items():
        arranged = part_layout(to, name)
        parts[name] = part if arranged is None else arranged.pack(part)
    return tensor.with_parts(parts, to)


def plain_shape(
    scheme: Scheme, layout: Layout, part: str, shape: tuple[int, int], stored: Shape
) -> Shape | None:
    """Return the plain shape of a stored part, or None if the layout never stores this shape."""
    arranged = part_layout(layout, part)
    if arranged is None:
        return stored
    # Padding is not invertible: several plain shapes may have the same stored one. So try each
    # shape that the scheme allows.
    plain = _plain_shapes(scheme, part, shape, stored)
    return next((shape for shape in plain if stored in arranged.stored(shape)), None)


def stored_shapes(
    scheme: Scheme, layout: Layout, part: str, shape: tuple[int, int], like: Shape
) -> tuple[Shape, ...]:
    """Return the shapes in which `layout` may store a part; the rank is the one of `like`."""
    plain = _plain_shapes(scheme, part, shape, like)
    arranged = part_layout(layout, part)
    return (
        plain
        if arranged is None
        else tuple(padded for unpadded in plain for padded in arranged.stored(unpadded))
    )


def plain_dtype(layout: Layout, part: str, stored: torch.dtype) -> torch.dtype:
    """Return the plain dtype of a stored part: packed codes become bytes."""
    arranged = part_layout(layout, part)
    return torch.uint8 if arranged is not None and arranged.dtype == stored else stored


def _plain_shapes(
    scheme: Scheme, part: str, shape: tuple[int, int], stored: Shape
) -> tuple[Shape, ...]:
    """Return the shapes of a plain part; its rank, if any, is the last length of `stored`."""
    rank = stored[-1] if stored else 0
    return tuple(
        tuple(rank if n == ANY_RANK else n for n in plain)
        for plain in scheme.part(part).shapes(*shape)
    )


def _to_plain(tensor: QuantTensor) -> QuantTensor:
    parts = {}
    for name, part in tensor.parts.items():
        arranged = part_layout(tensor.layout, name)
        if arranged is not None:
            (shape, *_) = _plain_shapes(tensor.scheme, name, tensor.shape, tuple(part.shape))
            # Unpacking keeps the padding of whole fragments or tiles; cut it off.
            part = arranged.unpack(part)[tuple(slice(n) for n in shape)].contiguous()
        parts[name] = part
    return tensor.with_parts(parts, PLAIN)
