"""Signatures of faults: each undoes one possible cause of a wrong weight.

A cause explains a wrong weight if undoing it reduces the error to the usual quantization error.
Signatures are tried in the order of `SIGNATURES`, from specific to general, because a general
correction, such as a factor, can also reduce the error of a specific fault.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from mezzotint.families import Family, families
from mezzotint.layouts.nunchaku import WARP, from_vector_fragments, to_vector_fragments
from mezzotint.layouts.tiles import from_tiles, padded_shape, to_tiles
from mezzotint.tensor import QuantTensor, relative_error

MIN_ERROR_RATIO = 1.5
"""Required ratio of the errors before and after a correction. It is small, because 4-bit
quantization alone costs 0.1: a fault with an error of 0.2 improves only by a factor of 2. The limit
on the remaining error is the stricter condition."""
DECODED_SCALES = ("weight_scale", "global_scale", "channel_scale", "pre_quant_scale", "smooth")
VECTORS = ("pre_quant_scale", "smooth", "channel_scale")
SHIFT_AND_SCALE = ((1, 0), (1, 0, 2), (1, 0, 2, 4, 3, 5))
"""Orders of the parts of AdaLN's modulation with shift and scale exchanged: without a gate, with a
gate, and for two sublayers with a gate."""
LOW_RANK = {"lora_down": "proj_down", "lora_up": "proj_up"}


@dataclass(frozen=True)
class WrongTensor:
    """A tensor that differs from the reference's.

    weight     the candidate's dequantized tensor, float32; [out, in] for a layer
    expected   the reference's tensor, of the same shape
    pieces     quantized tensors that `weight` was dequantized from; empty for an unquantized tensor
    sibling    function that returns the reference's weight, or bias, of another module, or None
    limit      largest relative error that quantization alone causes
    """

    module: str
    weight: Tensor
    expected: Tensor
    pieces: Sequence[QuantTensor]
    sibling: Callable[[str], Tensor | None]
    limit: float


@dataclass(frozen=True)
class Explanation:
    """A cause, what exactly was undone, and the relative errors before and after that."""

    cause: str
    detail: str
    before: float
    after: float

    def __str__(self) -> str:
        detail = f"{self.detail}; " if self.detail else ""
        errors = f"from {self.before:.3g} to {self.after:.3g}"
        return f"{detail}undoing this reduces the weight's error {errors}"


Correction = tuple[str, Tensor, Tensor]
"""(detail, corrected weight, expected weight)"""
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Signature:
    """One cause. `undo` yields corrections, and nothing if the cause is impossible for a tensor."""

    cause: str
    undo: Callable[[WrongTensor], Iterator[Correction]]


def explain(tensor: WrongTensor) -> Explanation | None:
    """Return the first cause of `SIGNATURES` that explains the error, or None."""
    before = relative_error(tensor.weight, tensor.expected)
    for signature in SIGNATURES:
        for detail, weight, expected in signature.undo(tensor):
            after = relative_error(weight, expected)
            if after <= tensor.limit and before >= MIN_ERROR_RATIO * after:
                return Explanation(signature.cause, detail, before, after)
    return None


def _not_finite(tensor: WrongTensor) -> Iterator[Correction]:
    is_finite = tensor.weight.isfinite()
    if not is_finite.all():
        yield (
            f"{(~is_finite).sum()} values",
            torch.where(is_finite, tensor.weight, tensor.expected),
            tensor.expected,
        )


def _zero(tensor: WrongTensor) -> Iterator[Correction]:
    """Replace output features whose weights, or whose codes, are all zero.

    With zero codes, the weight of an SVDQuant layer is not zero: its low-rank branch remains.
    """
    weight, expected = tensor.weight, tensor.expected
    empty = (weight == 0).flatten(1).all(1) if weight.ndim > 1 else weight == 0
    codes = [
        piece.parts["codes"].view(torch.uint8) for piece in tensor.pieces if "codes" in piece.parts
    ]
    same_rows = all(len(piece_codes) == len(weight) for piece_codes in codes)
    if codes and len(codes) == len(tensor.pieces) and same_rows:
        empty = empty | (torch.cat(codes, dim=1) == 0).all(1)
    if empty.any():
        mask = empty.reshape(-1, *[1] * (weight.ndim - 1))
        yield (
            f"{empty.sum()} of {len(empty)} output features",
            torch.where(mask, expected, weight),
            expected,
        )


def _with_parts(
    tensor: WrongTensor, detail: str, edit: Callable[[Parts], Parts]
) -> Iterator[Correction]:
    """Dequantize with edited parts.

    edit   returns the parts that change, and an empty dict if it does not apply
    """
    edits = [edit(dict(piece.parts)) for piece in tensor.pieces]
    if any(edits):
        weights = [
            piece.scheme.dequantize({**piece.parts, **parts})
            for piece, parts in zip(tensor.pieces, edits, strict=True)
        ]
        yield detail, torch.cat(weights, dim=1), tensor.expected


def _nibbles(tensor: WrongTensor) -> Iterator[Correction]:
    def swap(parts: Parts) -> Parts:
        codes = parts.get("codes")
        if codes is None or codes.dtype != torch.uint8:
            return {}
        return {"codes": (codes >> 4) | (codes << 4)}

    yield from _with_parts(tensor, "", swap)


def _tiles(tensor: WrongTensor) -> Iterator[Correction]:
    """Reorder block scales between 128x4 tiles and rows. Only complete tiles are reordered."""

    def rearrange(arrange: Callable[[Tensor], Tensor]) -> Callable[[Parts], Parts]:
        def edit(parts: Parts) -> Parts:
            scales = parts.get("block_scale")
            if scales is None or tuple(scales.shape) != padded_shape(*scales.shape):
                return {}
            raw = scales.contiguous()
            raw = raw.view(torch.uint8) if raw.dtype.itemsize == 1 else raw
            return {"block_scale": arrange(raw).contiguous().view(scales.dtype)}

        return edit

    yield from _with_parts(
        tensor, "tiles are read as rows", rearrange(lambda raw: from_tiles(raw, *raw.shape))
    )
    yield from _with_parts(tensor, "rows are read as tiles", rearrange(to_tiles))


def _fragments(tensor: WrongTensor) -> Iterator[Correction]:
    """Reorder channel vectors between plain order and the fragment order of Nunchaku's kernels."""

    def rearrange(arrange: Callable[[Tensor], Tensor], name: str) -> Callable[[Parts], Parts]:
        def edit(parts: Parts) -> Parts:
            vector = parts.get(name)
            if vector is None or vector.numel() % WARP:
                return {}
            return {name: arrange(vector).reshape(vector.shape)}

        return edit

    for name in VECTORS:
        plain = rearrange(lambda vector: from_vector_fragments(vector.reshape(1, -1)), name)
        packed = rearrange(lambda vector: to_vector_fragments(vector.reshape(-1, 1)), name)
        yield from _with_parts(tensor, f"{name} is read as plain", plain)
        yield from _with_parts(tensor, f"{name} is plain", packed)


def _inverted(tensor: WrongTensor) -> Iterator[Correction]:
    for name in DECODED_SCALES:

        def invert(parts: Parts, name: str = name) -> Parts:
            return {name: parts[name].float().reciprocal()} if name in parts else {}

        yield from _with_parts(tensor, name, invert)


def _low_rank(tensor: WrongTensor) -> Iterator[Correction]:
    """Move the low-rank branch between the smoothed and the unsmoothed input."""
    for names in (LOW_RANK, {new: old for old, new in LOW_RANK.items()}):
        if all(set(names) & piece.parts.keys() for piece in tensor.pieces) and tensor.pieces:
            weights = [
                piece.scheme.dequantize(
                    {names.get(name, name): part for name, part in piece.parts.items()}
                )
                for piece in tensor.pieces
            ]
            actual = "the scaled input" if names is LOW_RANK else "the layer's own input"
            yield f"it was given {actual}", torch.cat(weights, dim=1), tensor.expected


def _siblings(
    groups_of: Callable[[Family], Sequence[tuple[str, ...]]],
) -> Callable[[WrongTensor], Iterator[Correction]]:
    """Return a correction that takes a layer for one of its siblings, by any family's groups."""

    def undo(tensor: WrongTensor) -> Iterator[Correction]:
        parent, _, leaf = tensor.module.removesuffix(".bias").rpartition(".")
        groups = chain.from_iterable(map(groups_of, families().values()))
        for sibling in next((group for group in groups if leaf in group), ()):
            expected = None if sibling == leaf else tensor.sibling(f"{parent}.{sibling}")
            if expected is not None and expected.shape == tensor.weight.shape:
                yield f"it is {sibling}", tensor.weight, expected
                if tensor.pieces:
                    fitted = _rescale(tensor, expected)
                    yield f"its codes are those of {sibling}, but not its scales", fitted, expected

    return undo


def _rescale(tensor: WrongTensor, expected: Tensor) -> Tensor:
    """Return the weight with least-squares scales per block, or per row if it has no blocks."""
    blocks = [
        piece.parts["block_scale"].shape[1]
        for piece in tensor.pieces
        if "block_scale" in piece.parts
    ]
    count = sum(blocks) or 1
    weight, target = (
        values.reshape(len(values), count, -1) for values in (tensor.weight, expected)
    )
    tiny = torch.finfo(torch.float32).tiny
    squares = weight.square().sum(-1, keepdim=True).clamp_min(tiny)
    scales = (weight * target).sum(-1, keepdim=True) / squares
    return (weight * scales.clamp_min(0)).flatten(1)


def _is_modulation(module: str) -> bool:
    """Return whether a layer computes AdaLN's shift, scale and gate, by any family's names."""
    return any(word in module for f in families().values() for word in f.modulation_words)


def _modulation(tensor: WrongTensor) -> Iterator[Correction]:
    """Exchange shift and scale in the output features of a modulation."""
    for order in SHIFT_AND_SCALE:
        if _is_modulation(tensor.module) and len(tensor.weight) % len(order) == 0:
            parts = tensor.weight.chunk(len(order))
            detail = f"of {len(order)} parts" if len(order) > 2 else ""
            yield detail, torch.cat([parts[i] for i in order]), tensor.expected


def _gate_and_up(tensor: WrongTensor) -> Iterator[Correction]:
    """Exchange the halves of the output features of any layer but a modulation."""
    if not _is_modulation(tensor.module) and len(tensor.weight) % 2 == 0:
        yield "", torch.cat(tensor.weight.chunk(2)[::-1]), tensor.expected


def _factor(tensor: WrongTensor) -> Iterator[Correction]:
    """Multiply by the least-squares factor between both weights."""
    size = tensor.weight.square().sum()
    if size > 0:
        factor = (tensor.weight * tensor.expected).sum() / size
        yield (
            f"they are {1 / float(factor):.3g} times too large",
            tensor.weight * factor,
            tensor.expected,
        )


SIGNATURES = (
    Signature("not a number", _not_finite),
    Signature("weights zeroed", _zero),
    Signature("nibbles swapped", _nibbles),
    Signature("scales tiled", _tiles),
    Signature("vectors in fragment order", _fragments),
    Signature("scale direction inverted", _inverted),
    Signature("low-rank fed the wrong x", _low_rank),
    Signature("q/k/v order", _siblings(lambda family: family.qkv)),
    Signature("gate/up order", _siblings(lambda family: family.gate_up)),
    Signature("halves of AdaLN swapped", _modulation),
    Signature("gate/up order", _gate_and_up),
    Signature("scales off by a factor", _factor),
)
