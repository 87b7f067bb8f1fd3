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


def plain_shape(scheme: Scheme, layout: Layout, part: str, shape: tuple[int, int], stored: Shape) -> Shape:
    """The shape that a stored part has once it is plain; a stored shape that the layout forbids comes back as it is."""
    if part == "block_scale" and layout.scales == "tiles_128x4":
        rows, columns = shape[0], shape[1] // scheme.group
        return (rows, columns) if stored == padded_shape(rows, columns) else stored
    return stored


def _to_plain(tensor: QuantTensor) -> QuantTensor:
    parts = dict(tensor.parts)
    rows, columns = tensor.shape
    if tensor.layout.codes == "high_first":
        parts["codes"] = swap_nibbles(parts["codes"])
    if tensor.layout.scales == "tiles_128x4":
        parts["block_scale"] = from_tiles(parts["block_scale"], rows, columns // tensor.scheme.group)
    return tensor.with_parts(parts, PLAIN)
