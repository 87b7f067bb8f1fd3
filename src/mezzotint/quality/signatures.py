"""Why a weight is wrong: each cause is a hypothesis, and its test is to undo it and see whether the error falls.

A cause that is undone brings a wrong weight back to what rounding alone does to it. The hypotheses are tried in the
order of `SIGNATURES`, the particular ones before the general ones.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.layouts.nunchaku import WARP, from_vector_fragments, to_vector_fragments
from mezzotint.layouts.tiles import from_tiles, padded_shape, to_tiles
from mezzotint.tensor import QuantTensor

FALL = 1.5
"""How many times smaller the error has to be with a cause undone. 4 bits alone cost 0.1, so that a fault of 0.2 that is
found out falls by no more than 2; that what is left must be sound is the stricter condition."""
DECODED_SCALES = ("weight_scale", "global_scale", "channel_scale", "pre_quant_scale", "smooth")
VECTORS = ("pre_quant_scale", "smooth", "channel_scale")
SIBLINGS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"), ("w1", "w3"))
"""Layers of one parent and one shape that an exporter may take for one another; w1 and w3 are gate and up (Z-Image)."""
MODULATION = re.compile(r"norm|_mod\b|modulation")
"""In the names of layers that give AdaLN's shift, scale and gate: FLUX's norms, Qwen-Image's img_mod, FLUX.2's and
Z-Image's modulations."""
SHIFT_AND_SCALE = ((1, 0), (1, 0, 2), (1, 0, 2, 4, 3, 5))
"""The parts of AdaLN's modulation with shift and scale exchanged: alone, with a gate, and two of the latter."""
LOW_RANK = {"lora_down": "proj_down", "lora_up": "proj_up"}


@dataclass(frozen=True)
class Suspicion:
    """A tensor that is not what the reference has.

    weight     as the candidate's file stands for it, float32; a layer's is [out, in]
    expected   the reference's, of the same shape
    pieces     the quantized parts that `weight` was decoded from; none for an unquantized tensor
    sibling    gives the reference's weight, or bias, of another module, or None where it has none
    limit      the relative error that rounding alone may give
    """

    module: str
    weight: Tensor
    expected: Tensor
    pieces: Sequence[QuantTensor]
    sibling: Callable[[str], Tensor | None]
    limit: float


@dataclass(frozen=True)
class Explanation:
    """The cause that, undone, leaves the smaller error; `detail` says what exactly was undone."""

    cause: str
    detail: str
    before: float
    after: float

    def __str__(self) -> str:
        said = f"{self.detail}; " if self.detail else ""
        return f"{said}undone, the weight's error falls from {self.before:.3g} to {self.after:.3g}"


Trial = tuple[str, Tensor, Tensor]
"""(detail, the weight with a cause undone, what it is to be)"""
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Signature:
    """One cause; `undo` gives the trials that would follow from it, none where it cannot be."""

    cause: str
    undo: Callable[[Suspicion], Iterator[Trial]]


def relative_error(values: Tensor, expected: Tensor) -> float:
    """|values - expected| / |expected| (Frobenius); infinite where something is not a number."""
    tiny = torch.finfo(torch.float32).tiny
    error = float((values.float() - expected.float()).norm() / expected.float().norm().clamp_min(tiny))
    return math.inf if math.isnan(error) else error


def explain(suspicion: Suspicion) -> Explanation | None:
    """The first cause of `SIGNATURES` that accounts for the error, or None."""
    before = relative_error(suspicion.weight, suspicion.expected)
    for signature in SIGNATURES:
        for detail, weight, expected in signature.undo(suspicion):
            after = relative_error(weight, expected)
            if after <= suspicion.limit and before >= FALL * after:
                return Explanation(signature.cause, detail, before, after)
    return None


def _not_finite(suspicion: Suspicion) -> Iterator[Trial]:
    sound = suspicion.weight.isfinite()
    if not sound.all():
        yield f"{(~sound).sum()} values", torch.where(sound, suspicion.weight, suspicion.expected), suspicion.expected


def _zero(suspicion: Suspicion) -> Iterator[Trial]:
    """Whole output features that are zero, or whose codes are: then a low-rank branch is left."""
    weight, expected = suspicion.weight, suspicion.expected
    empty = (weight == 0).flatten(1).all(1) if weight.ndim > 1 else weight == 0
    codes = [piece.parts["codes"].view(torch.uint8) for piece in suspicion.pieces if "codes" in piece.parts]
    if codes and len(codes) == len(suspicion.pieces) and all(len(own) == len(weight) for own in codes):
        empty = empty | (torch.cat(codes, dim=1) == 0).all(1)
    if empty.any():
        mask = empty.reshape(-1, *[1] * (weight.ndim - 1))
        yield f"{empty.sum()} of {len(empty)} output features", torch.where(mask, expected, weight), expected


def _edited(suspicion: Suspicion, detail: str, edit: Callable[[Parts], Parts]) -> Iterator[Trial]:
    """The weight that other parts would stand for: `edit` gives those that change, none where it does not apply."""
    edits = [edit(dict(piece.parts)) for piece in suspicion.pieces]
    if any(edits):
        both = zip(suspicion.pieces, edits, strict=True)
        weights = [piece.scheme.dequantize({**piece.parts, **parts}) for piece, parts in both]
        yield detail, torch.cat(weights, dim=1), suspicion.expected


def _nibbles(suspicion: Suspicion) -> Iterator[Trial]:
    def swap(parts: Parts) -> Parts:
        codes = parts.get("codes")
        return {} if codes is None or codes.dtype != torch.uint8 else {"codes": (codes >> 4) | (codes << 4)}

    yield from _edited(suspicion, "", swap)


def _tiles(suspicion: Suspicion) -> Iterator[Trial]:
    """Stored in 128x4 tiles and read as rows, or the other way round; whole tiles only."""

    def rearranged(arrange: Callable[[Tensor], Tensor]) -> Callable[[Parts], Parts]:
        def edit(parts: Parts) -> Parts:
            scales = parts.get("block_scale")
            if scales is None or tuple(scales.shape) != padded_shape(*scales.shape):
                return {}
            raw = scales.contiguous()
            raw = raw.view(torch.uint8) if raw.dtype.itemsize == 1 else raw
            return {"block_scale": arrange(raw).contiguous().view(scales.dtype)}

        return edit

    yield from _edited(suspicion, "tiles are read as rows", rearranged(lambda raw: from_tiles(raw, *raw.shape)))
    yield from _edited(suspicion, "rows are read as tiles", rearranged(to_tiles))


def _fragments(suspicion: Suspicion) -> Iterator[Trial]:
    def rearranged(arrange: Callable[[Tensor], Tensor], name: str) -> Callable[[Parts], Parts]:
        def edit(parts: Parts) -> Parts:
            vector = parts.get(name)
            return {} if vector is None or vector.numel() % WARP else {name: arrange(vector).reshape(vector.shape)}

        return edit

    for name in VECTORS:
        plain = rearranged(lambda vector: from_vector_fragments(vector.reshape(1, -1)), name)
        packed = rearranged(lambda vector: to_vector_fragments(vector.reshape(-1, 1)), name)
        yield from _edited(suspicion, f"{name} is read as plain", plain)
        yield from _edited(suspicion, f"{name} is plain", packed)


def _inverted(suspicion: Suspicion) -> Iterator[Trial]:
    for name in DECODED_SCALES:

        def invert(parts: Parts, name: str = name) -> Parts:
            return {name: parts[name].float().reciprocal()} if name in parts else {}

        yield from _edited(suspicion, name, invert)


def _low_rank(suspicion: Suspicion) -> Iterator[Trial]:
    """The branch belongs on the layer's own input where it was given the scaled one, or the other way round."""
    for names in (LOW_RANK, {own: scaled for scaled, own in LOW_RANK.items()}):
        if all(set(names) & piece.parts.keys() for piece in suspicion.pieces) and suspicion.pieces:
            weights = [
                piece.scheme.dequantize({names.get(name, name): part for name, part in piece.parts.items()})
                for piece in suspicion.pieces
            ]
            given = "the scaled input" if names is LOW_RANK else "the layer's own input"
            yield f"it was given {given}", torch.cat(weights, dim=1), suspicion.expected


def _siblings(names: Sequence[tuple[str, ...]]) -> Callable[[Suspicion], Iterator[Trial]]:
    def undo(suspicion: Suspicion) -> Iterator[Trial]:
        parent, _, leaf = suspicion.module.removesuffix(".bias").rpartition(".")
        for other in next((group for group in names if leaf in group), ()):
            expected = None if other == leaf else suspicion.sibling(f"{parent}.{other}")
            if expected is not None and expected.shape == suspicion.weight.shape:
                yield f"it is {other}", suspicion.weight, expected
                if suspicion.pieces:
                    fitted = _rescaled(suspicion, expected)
                    yield f"its codes are those of {other}, its scales its own", fitted, expected

    return undo


def _rescaled(suspicion: Suspicion, expected: Tensor) -> Tensor:
    """The weight with the scales of its blocks, or else of its rows, as they fit best."""
    blocks = [piece.parts["block_scale"].shape[1] for piece in suspicion.pieces if "block_scale" in piece.parts]
    count = sum(blocks) or 1
    weight, wanted = (values.reshape(len(values), count, -1) for values in (suspicion.weight, expected))
    tiny = torch.finfo(torch.float32).tiny
    scales = (weight * wanted).sum(-1, keepdim=True) / weight.square().sum(-1, keepdim=True).clamp_min(tiny)
    return (weight * scales.clamp_min(0)).flatten(1)


def _modulation(suspicion: Suspicion) -> Iterator[Trial]:
    """Of the output features of a modulation: shift and scale."""
    for order in SHIFT_AND_SCALE:
        if MODULATION.search(suspicion.module) and len(suspicion.weight) % len(order) == 0:
            parts = suspicion.weight.chunk(len(order))
            detail = f"of {len(order)} parts" if len(order) > 2 else ""
            yield detail, torch.cat([parts[i] for i in order]), suspicion.expected


def _gate_and_up(suspicion: Suspicion) -> Iterator[Trial]:
    """Halves of the output features of any other layer."""
    if not MODULATION.search(suspicion.module) and len(suspicion.weight) % 2 == 0:
        yield "", torch.cat(suspicion.weight.chunk(2)[::-1]), suspicion.expected


def _factor(suspicion: Suspicion) -> Iterator[Trial]:
    """The least-squares factor between the two weights."""
    size = suspicion.weight.square().sum()
    if size > 0:
        factor = (suspicion.weight * suspicion.expected).sum() / size
        yield f"they are {1 / float(factor):.3g} times too large", suspicion.weight * factor, suspicion.expected


SIGNATURES = (
    Signature("not a number", _not_finite),
    Signature("weights zeroed", _zero),
    Signature("nibbles swapped", _nibbles),
    Signature("scales tiled", _tiles),
    Signature("vectors in fragment order", _fragments),
    Signature("scale direction inverted", _inverted),
    Signature("low-rank fed the wrong x", _low_rank),
    Signature("q/k/v order", _siblings(SIBLINGS[:2])),
    Signature("gate/up order", _siblings(SIBLINGS[2:])),
    Signature("halves of AdaLN swapped", _modulation),
    Signature("gate/up order", _gate_and_up),
    Signature("scales off by a factor", _factor),
)
