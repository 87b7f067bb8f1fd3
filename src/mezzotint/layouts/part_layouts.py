"""The ways to store one part of a quantized weight: a pair of functions and its shapes."""

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
class PartLayout:
    """One way to store a part.

    pack     plain part -> stored tensor, padded to whole fragments or tiles if needed
    unpack   stored tensor -> plain part, which may still be padded at the end of each axis
    stored   plain shape -> shapes that files use; the first is the one that `pack` returns
    dtype    dtype of stored codes, or None if it is the plain one
    """

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]
    stored: Callable[[Shape], tuple[Shape, ...]]
    dtype: torch.dtype | None = None


def pad(values: Tensor, multiples: Shape, fill: float) -> Tensor:
    """Pad each axis to a multiple with `fill`."""
    shape = round_up_shape(tuple(values.shape), multiples)
    if shape == tuple(values.shape):
        return values.contiguous()
    padded = torch.full(shape, fill, dtype=values.dtype, device=values.device)
    padded[tuple(slice(n) for n in values.shape)] = values
    return padded


def round_up_shape(shape: Shape, multiples: Shape) -> Shape:
    """Round each length up to a multiple."""
    return tuple(-(-n // m) * m for n, m in zip(shape, multiples, strict=True))


def _same_shape(shape: Shape) -> tuple[Shape, ...]:
    return (shape,)


def _transposed(shape: Shape) -> tuple[Shape, ...]:
    return (shape[::-1],)


def _paddings(length: int) -> tuple[int, ...]:
    return (length, *(-(-length // multiple) * multiple for multiple in (8, 16, 32)))


def _padded(shape: Shape) -> tuple[Shape, ...]:
    """Return the shapes of codes in files whose scales are in tiles.

    Such files are made for one kind of kernel and pad the codes too. comfy-kitchen and ModelOpt
    pad rows and columns to multiples of 16 or of 32.
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
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> PartLayout:
    """Return a layout of whole fragments: pad to `multiples` with `fill` before packing.

    transposed   whether the stored shape has its axes swapped
    """
    return PartLayout(
        pack=lambda plain: pack(pad(plain, multiples, fill)),
        unpack=lambda stored: unpack(stored.contiguous()),
        stored=lambda shape: (round_up_shape(shape, multiples)[:: -1 if transposed else 1],),
        dtype=dtype,
    )


WARP, RANKS = nunchaku.WARP, nunchaku.RANKS
# Files differ in how far they pad the columns before they make tiles, so several shapes are valid.
TILES = PartLayout(
    to_tiles,
    lambda tiles: from_tiles(tiles, *tiles.shape),
    lambda shape: tuple(padded_shape(shape[0], columns) for columns in _paddings(shape[1])),
)
BY_GROUP = PartLayout(_transpose, _transpose, _transposed)
# DeepCompressor pads the groups to 16; other files have only those that the layer needs.
AWQ_GROUPS = PartLayout(
    pack=lambda plain: _transpose(pad(plain, (1, nunchaku.AWQ_GROUPS), 0)),
    unpack=_transpose,
    stored=lambda shape: (round_up_shape(shape, (1, nunchaku.AWQ_GROUPS))[::-1], shape[::-1]),
)
CODES: Mapping[str, PartLayout] = {
    "high_first": PartLayout(swap_nibbles, swap_nibbles, _same_shape),
    "low_first_int8": PartLayout(
        lambda c: c.view(torch.int8), lambda c: c.view(torch.uint8), _same_shape, torch.int8
    ),
    "fragments": _fragments(
        nunchaku.to_code_fragments,
        nunchaku.from_code_fragments,
        (WARP, WARP // 2),
        0,
        dtype=torch.int8,
    ),
    "awq_words": PartLayout(
        nunchaku.to_awq_words,
        nunchaku.from_awq_words,
        lambda shape: ((shape[0] // nunchaku.AWQ_ROWS, shape[1]),),
        torch.int32,
    ),
}
TILED_CODES: Mapping[str, PartLayout] = {
    "high_first": PartLayout(swap_nibbles, swap_nibbles, _padded),
    "low_first": PartLayout(_identity, _identity, _padded),
}
# Padding must not change the result: codes and low-rank factors of 0 add nothing. Scales and
# smoothing are padded with 1, as in DeepCompressor, because the input is divided by the smoothing.
SCALES: Mapping[str, PartLayout] = {
    "tiles_128x4": TILES,
    "by_group": BY_GROUP,
    "awq_groups": AWQ_GROUPS,
    "fragments": _fragments(
        nunchaku.to_vector_fragments,
        nunchaku.from_vector_fragments,
        (WARP, WARP // 64),
        1,
        transposed=True,
    ),
    "micro_fragments": _fragments(
        nunchaku.to_micro_fragments,
        nunchaku.from_micro_fragments,
        (WARP, WARP // 16),
        1,
        transposed=True,
    ),
}
VECTORS: Mapping[str, PartLayout] = {
    "fragments": _fragments(
        lambda plain: nunchaku.to_vector_fragments(plain.unsqueeze(1)).squeeze(0),
        lambda stored: nunchaku.from_vector_fragments(stored.unsqueeze(0)).squeeze(1),
        (WARP,),
        1,
    ),
}
DOWN: Mapping[str, PartLayout] = {
    "fragments": _fragments(
        nunchaku.to_down_fragments, nunchaku.from_down_fragments, (RANKS, WARP), 0, transposed=True
    ),
    "down_by_column": BY_GROUP,
}
UP: Mapping[str, PartLayout] = {
    "fragments": _fragments(nunchaku.to_up_fragments, nunchaku.from_up_fragments, (WARP, RANKS), 0),
}
"""{value of a field of `Layout`: part layout}, per kind of part; absent values are plain."""


def part_layout(layout: Layout, part: str) -> PartLayout | None:
    """Return how `layout` stores this part, or None if it stores it plain."""
    find = _FINDERS.get(part)
    return None if find is None else find(layout)


_FINDERS: Mapping[str, Callable[[Layout], PartLayout | None]] = {
    "codes": lambda layout: (TILED_CODES if layout.scales == "tiles_128x4" else CODES).get(
        layout.codes
    ),
    "proj_down": lambda layout: DOWN.get(layout.low_rank),
    "proj_up": lambda layout: UP.get(layout.low_rank),
    **dict.fromkeys(("block_scale", "block_zero"), lambda layout: SCALES.get(layout.scales)),
    **dict.fromkeys(
        ("bias", "smooth", "channel_scale"), lambda layout: VECTORS.get(layout.vectors)
    ),
}
