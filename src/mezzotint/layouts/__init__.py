"""Pure functions on bytes: how one arrangement of a quantized weight becomes another."""

import torch

from mezzotint.layouts.arrangements import arrangement
from mezzotint.layouts.fp4 import swap_nibbles
from mezzotint.layouts.tiles import from_tiles, to_tiles
from mezzotint.schemes import RANK, Scheme, Shape
from mezzotint.tensor import PLAIN, Layout, QuantTensor

__all__ = ["convert", "from_tiles", "plain_dtype", "plain_shape", "stored_shapes", "swap_nibbles", "to_tiles"]


def convert(tensor: QuantTensor, to: Layout) -> QuantTensor:
    """The same weight with its bytes arranged as `to`: identity if they already are, else by way of plain."""
    if tensor.layout == to:
        return tensor
    parts = {}
    for name, part in _to_plain(tensor).parts.items():
        arranged = arrangement(to, name)
        parts[name] = part if arranged is None else arranged.pack(part)
    return tensor.with_parts(parts, to)


def plain_shape(scheme: Scheme, layout: Layout, part: str, shape: tuple[int, int], stored: Shape) -> Shape | None:
    """The shape that a stored part has once it is plain; None where the layout does not store it in this shape."""
    arranged = arrangement(layout, part)
    if arranged is None:
        return stored
    plain = _plain_shapes(scheme, part, shape, stored)
    return next((own for own in plain if stored in arranged.stored(own)), None)


def stored_shapes(scheme: Scheme, layout: Layout, part: str, shape: tuple[int, int], like: Shape) -> tuple[Shape, ...]:
    """The shapes that `layout` may give a part; a rank is taken from `like`."""
    plain = _plain_shapes(scheme, part, shape, like)
    arranged = arrangement(layout, part)
    return plain if arranged is None else tuple(shape for own in plain for shape in arranged.stored(own))


def plain_dtype(layout: Layout, part: str, stored: torch.dtype) -> torch.dtype:
    """The dtype that a stored part has once it is plain: packed codes are bytes then."""
    arranged = arrangement(layout, part)
    return torch.uint8 if arranged is not None and arranged.dtype == stored else stored


def _plain_shapes(scheme: Scheme, part: str, shape: tuple[int, int], stored: Shape) -> tuple[Shape, ...]:
    """The shapes of a plain part, its rank, if it has one, being the last length of the stored shape."""
    rank = stored[-1] if stored else 0
    return tuple(tuple(rank if n == RANK else n for n in own) for own in scheme.part(part).shapes(*shape))


def _to_plain(tensor: QuantTensor) -> QuantTensor:
    parts = {}
    for name, part in tensor.parts.items():
        arranged = arrangement(tensor.layout, name)
        if arranged is not None:
            (shape, *_) = _plain_shapes(tensor.scheme, name, tensor.shape, tuple(part.shape))
            part = arranged.unpack(part)[tuple(slice(n) for n in shape)].contiguous()
        parts[name] = part
    return tensor.with_parts(parts, PLAIN)
