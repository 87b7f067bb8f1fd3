"""How the bytes of a file's 4-bit weights are arranged, and why that is believed.

Three kinds of evidence, best first: a shape that only one arrangement allows; numbers that agree with known BF16
weights under one arrangement alone; and, where there is neither, what the file's format is known for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mezzotint.formats.contents import StoredLinear
from mezzotint.formats.header import Header
from mezzotint.layouts import plain_shape

TILES, ROWS = "tiles_128x4", "row_major"


@dataclass(frozen=True)
class Settled:
    """Linears whose layout has been settled, and the sentences that say how."""

    linears: Mapping[str, StoredLinear]
    evidence: tuple[str, ...]


def settle_scales(header: Header, linears: Mapping[str, StoredLinear]) -> Settled:
    """Decide from shapes whether block scales lie in tiles; where every shape allows both, `linears` keep theirs."""
    blocked = [linear for linear in linears.values() if "block_scale" in linear.keys]
    if not blocked:
        return Settled(linears, ())
    for order in (TILES, ROWS):
        other = ROWS if order == TILES else TILES
        only = [linear for linear in blocked if _fits(linear, header, order) and not _fits(linear, header, other)]
        if only:
            key = only[0].keys["block_scale"]
            shape = list(header.tensors[key].shape)
            said = f"scales {order.replace('_', ' ')}: implied, {len(only)} have a shape that allows nothing else"
            return Settled(with_scales(linears, order), (f"{said} ({key} is {shape})",))
    order = blocked[0].layout.scales.replace("_", " ")
    return Settled(linears, (f"scales {order}: as the format has them, their shapes would allow both orders",))


def with_scales(linears: Mapping[str, StoredLinear], order: str) -> dict[str, StoredLinear]:
    """The same linears with all their block scales in this order."""
    return {name: _with(linear, order) for name, linear in linears.items()}


def _with(linear: StoredLinear, order: str) -> StoredLinear:
    if "block_scale" not in linear.keys:
        return linear
    return replace(linear, layout=replace(linear.layout, scales=order))


def _fits(linear: StoredLinear, header: Header, order: str) -> bool:
    info = header.tensors.get(linear.keys["block_scale"])
    if info is None:
        return False
    layout = replace(linear.layout, scales=order)
    shape = plain_shape(linear.scheme, layout, "block_scale", linear.shape, info.shape)
    return shape is not None and shape in linear.scheme.part("block_scale").shapes(*linear.shape)
