"""Pure functions on bytes: how one arrangement of a quantized weight becomes another."""

from torch import Tensor

from mezzotint.layouts.fp4 import swap_nibbles
from mezzotint.layouts.tiles import from_tiles, padded_shape, to_tiles
from mezzotint.schemes import Scheme, Shape
from mezzotint.tensor import PLAIN, Layout, QuantTensor

__all__ = ["convert", "from_tiles", "plain_shape", "swap_nibbles", "to_tiles"]


def convert(tensor: QuantTensor, to: Layout) -> QuantTensor:
    """The same weight with its bytes arranged as `to`: identity if they already are, else by way of plain."""
    if tensor.layout == to:
        return tensor
    plain = _to_plain(tensor)
    parts: dict[str, Tensor] = dict(plain.parts)
    if to.codes == "high_first":
        parts["codes"] = swap_nibbles(parts["codes"])
    if to.scales == "tiles_128x4":
        parts["block_scale"] = to_tiles(parts["block_scale"])
    return tensor.with_parts(parts, to)


def plain_shape(scheme: Scheme, layout: Layout, part: str, shape: tuple[int, int], stored: Shape) -> Shape | None:
    """The shape that a stored part has once it is plain; None where the layout does not store it in this shape.

    Files with scales in tiles are made for one kind of kernel, and pad the codes too: rows and columns to multiples
    of 16 or 32, of which comfy-kitchen and ModelOpt take one or the other.
    """
    if layout.scales != "tiles_128x4" or part not in ("codes", "block_scale"):
        return stored
    (plain,) = scheme.part(part).shapes(*shape)
    rows, columns = plain
    if part == "codes":
        allowed = {(padded_rows, padded) for padded_rows in _paddings(rows) for padded in _paddings(columns)}
    else:
        allowed = {padded_shape(rows, padded) for padded in (columns, *_paddings(columns))}
    return plain if stored in allowed else None


def _paddings(length: int) -> tuple[int, ...]:
    return (length, *(-(-length // multiple) * multiple for multiple in (8, 16, 32)))


def _to_plain(tensor: QuantTensor) -> QuantTensor:
    parts = dict(tensor.parts)
    if tensor.layout.codes == "high_first":
        parts["codes"] = swap_nibbles(parts["codes"])
    if tensor.layout.scales == "tiles_128x4":
        for name in ("codes", "block_scale"):
            ((rows, columns),) = tensor.scheme.part(name).shapes(*tensor.shape)
            tiled = name == "block_scale"
            parts[name] = from_tiles(parts[name], rows, columns) if tiled else parts[name][:rows, :columns].contiguous()
    return tensor.with_parts(parts, PLAIN)
