"""Every way in which one part of a quantized weight may lie in a file, as a pair of functions and a shape."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.layouts import nunchaku
from mezzotint.layouts.fp4 import swap_nibbles
from mezzotint.layouts.tiles import from_tiles, padded_shape, to_tiles
from mezzotint.schemes import Shape
from mezzotint.tensor import Layout


@dataclass(frozen=True)
class Arrangement:
    """One way of storing a part.

    pack     plain part -> stored tensor, padded where whole fragments or tiles are needed
    unpack   stored tensor -> plain part, perhaps still padded at the end of each axis
    stored   plain shape -> the shapes that a file may give it, the one that `pack` gives first
    dtype    of stored codes, None where it is that of the plain part
    """

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]
    stored: Callable[[Shape], tuple[Shape, ...]]
    dtype: torch.dtype | None = None


def pad(values: Tensor, multiples: Shape, fill: float) -> Tensor:
    """`values` with each axis grown to a multiple, the new entries being `fill`."""
    shape = grown(tuple(values.shape), multiples)
    if shape == tuple(values.shape):
        return values.contiguous()
    padded = torch.full(shape, fill, dtype=values.dtype, device=values.device)
    padded[tuple(slice(n) for n in values.shape)] = values
    return padded


def grown(shape: Shape, multiples: Shape) -> Shape:
    """`shape` rounded up to multiples."""
    return tuple(-(-n // m) * m for n, m in zip(shape, multiples, strict=True))


def _same(shape: Shape) -> tuple[Shape, ...]:
    return (shape,)


def _turned(shape: Shape) -> tuple[Shape, ...]:
    return (shape[::-1],)


def _paddings(length: int) -> tuple[int, ...]:
    return (length, *(-(-length // multiple) * multiple for multiple in (8, 16, 32)))


def _padded(shape: Shape) -> tuple[Shape, ...]:
    """Files with scales in tiles are made for one kind of kernel, and pad the codes too: rows and columns to multiples
    of 16 or 32, of which comfy-kitchen and ModelOpt take one or the other.
    """
    return tuple((rows, columns) for rows in _paddings(shape[0]) for columns in _paddings(shape[1]))


def _identity(values: Tensor) -> Tensor:
    return values


def _transpose(values: Tensor) -> Tensor:
    return values.t().contiguous()


def _fragments(
    pack: Callable[[Tensor], Tensor],
    unpack: Callable[[Tensor], Tensor],
    multiples: Shape,
    fill: float,
    turned: bool = False,
    dtype: torch.dtype | None = None,
) -> Arrangement:
    """An arrangement of whole fragments: sides are grown to `multiples` with `fill` first; `turned` swaps the axes."""
    return Arrangement(
        pack=lambda plain: pack(pad(plain, multiples, fill)),
        unpack=lambda stored: unpack(stored.contiguous()),
        stored=lambda shape: (grown(shape, multiples)[:: -1 if turned else 1],),
        dtype=dtype,
    )


WARP, RANKS = nunchaku.WARP, nunchaku.RANKS
TILES = Arrangement(
    to_tiles,
    lambda tiles: from_tiles(tiles, *tiles.shape),
    lambda shape: tuple(padded_shape(shape[0], columns) for columns in _paddings(shape[1])),
)
BY_GROUP = Arrangement(_transpose, _transpose, _turned)
AWQ_GROUPS = Arrangement(
    pack=lambda plain: _transpose(pad(plain, (1, nunchaku.AWQ_GROUPS), 0)),
    unpack=_transpose,
    stored=lambda shape: (grown(shape, (1, nunchaku.AWQ_GROUPS))[::-1], shape[::-1]),
)
CODES: Mapping[str, Arrangement] = {
    "high_first": Arrangement(swap_nibbles, swap_nibbles, _same),
    "low_first_int8": Arrangement(lambda c: c.view(torch.int8), lambda c: c.view(torch.uint8), _same, torch.int8),
    "fragments": _fragments(
        nunchaku.to_code_fragments, nunchaku.from_code_fragments, (WARP, WARP // 2), 0, dtype=torch.int8
    ),
    "awq_words": Arrangement(
        nunchaku.to_awq_words,
        nunchaku.from_awq_words,
        lambda shape: ((shape[0] // nunchaku.AWQ_ROWS, shape[1]),),
        torch.int32,
    ),
}
TILED_CODES: Mapping[str, Arrangement] = {
    "high_first": Arrangement(swap_nibbles, swap_nibbles, _padded),
    "low_first": Arrangement(_identity, _identity, _padded),
}
SCALES: Mapping[str, Arrangement] = {
    "tiles_128x4": TILES,
    "by_group": BY_GROUP,
    "awq_groups": AWQ_GROUPS,
    "fragments": _fragments(
        nunchaku.to_vector_fragments, nunchaku.from_vector_fragments, (WARP, WARP // 64), 1, turned=True
    ),
    "micro_fragments": _fragments(
        nunchaku.to_micro_fragments, nunchaku.from_micro_fragments, (WARP, WARP // 16), 1, turned=True
    ),
}
VECTORS: Mapping[str, Arrangement] = {
    "fragments": _fragments(
        lambda plain: nunchaku.to_vector_fragments(plain.unsqueeze(1)).squeeze(0),
        lambda stored: nunchaku.from_vector_fragments(stored.unsqueeze(0)).squeeze(1),
        (WARP,),
        1,
    ),
}
DOWN: Mapping[str, Arrangement] = {
    "fragments": _fragments(nunchaku.to_down_fragments, nunchaku.from_down_fragments, (RANKS, WARP), 0, turned=True),
    "down_by_column": BY_GROUP,
}
UP: Mapping[str, Arrangement] = {
    "fragments": _fragments(nunchaku.to_up_fragments, nunchaku.from_up_fragments, (WARP, RANKS), 0),
}
"""{value of a Layout's field: arrangement}, for each kind of part; what is absent is plain."""


def arrangement(layout: Layout, part: str) -> Arrangement | None:
    """How `layout` stores this part, None where it stores it plain."""
    find = _FINDERS.get(part)
    return None if find is None else find(layout)


_FINDERS: Mapping[str, Callable[[Layout], Arrangement | None]] = {
    "codes": lambda layout: (TILED_CODES if layout.scales == "tiles_128x4" else CODES).get(layout.codes),
    "proj_down": lambda layout: DOWN.get(layout.low_rank),
    "proj_up": lambda layout: UP.get(layout.low_rank),
    **dict.fromkeys(("block_scale", "block_zero"), lambda layout: SCALES.get(layout.scales)),
    **dict.fromkeys(("bias", "smooth", "channel_scale"), lambda layout: VECTORS.get(layout.vectors)),
}
