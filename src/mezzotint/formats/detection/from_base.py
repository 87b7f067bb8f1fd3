"""Find the layout under which the weights agree with the BF16 weights they were made from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import itemgetter

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.errors import UnknownFormat
from mezzotint.formats.contents import Contents, StoredLinear
from mezzotint.formats.detection.evidence import (
    CODE_ORDERS,
    ROWS,
    TILES,
    fits,
    with_layout,
    with_layouts,
)
from mezzotint.formats.header import Header
from mezzotint.schemes import NVFP4
from mezzotint.tensor import Layout

MIN_COSINE, ERROR_RATIO = 0.5, 1.1
"""Least cosine with the base, and how much larger the error of a wrong arrangement must be.

Swapped nibbles bring the cosine to 0. Scales in the wrong order may change it little, from 0.995
to 0.992 where all blocks have similar sizes. The error, sqrt(1 - cosine^2), then grows from 0.10
to 0.13. Equal scales, which MXFP8 may have, fit in both orders.
"""
UNLIKE_FORMAT = "unlike the format's usual layout"


@dataclass(frozen=True)
class Sample:
    """Some output features of a stored linear, and their BF16 weights.

    first, last   range [first, last) of output features
    weight        [last - first, in], without padding
    """

    linear: StoredLinear
    first: int
    last: int
    weight: Tensor


def detect_from_samples(
    header: Header, contents: Contents, samples: Sequence[Sample], base: str
) -> Contents:
    """Return the contents with the arrangement under which the samples agree with BF16.

    If several arrangements fit equally well, the format's usual order of scales decides.

    Raises  UnknownFormat if the samples agree under none
    """
    found = [
        (_agreement(header, samples, layout), layout) for layout in _candidates(header, samples)
    ]
    ranked = sorted(found, key=itemgetter(0))
    best, layout = ranked[-1]
    cosines = "; ".join(f"{layout}: cosine {cosine:.4f}" for cosine, layout in reversed(ranked))
    if not best >= MIN_COSINE:
        raise UnknownFormat(
            f"{header.path}: no arrangement of its bytes agrees with {base} ({cosines})",
            "is the base of the same model?",
        )
    usual = samples[0].linear.layout
    similar = [layout for cosine, layout in ranked if _error(cosine) < ERROR_RATIO * _error(best)]
    layout = next((fitting for fitting in similar if fitting.scales == usual.scales), layout)
    contrast = "" if usual == layout else f", {UNLIKE_FORMAT} ({usual})"
    evidence = f"layout measured on {len(samples)} layers against {base}{contrast}: {cosines}"
    linears = with_layouts(contents.linears, layout.codes, layout.scales)
    return replace(contents, linears=linears, evidence=(evidence,), assumed=frozenset())


def _error(cosine: float) -> float:
    return math.sqrt(max(1 - cosine**2, 1e-12))


def _candidates(header: Header, samples: Sequence[Sample]) -> list[Layout]:
    """Return the layouts that the shapes of all samples allow."""
    orders = [
        order
        for order in (TILES, ROWS)
        if all(fits(sample.linear, header, order) for sample in samples)
    ]
    in_4_bits = any(sample.linear.scheme is NVFP4 for sample in samples)
    codes = CODE_ORDERS if in_4_bits else (samples[0].linear.layout.codes,)
    return [Layout(*layout) for layout in product(codes, orders)]


def _agreement(header: Header, samples: Sequence[Sample], layout: Layout) -> float:
    """Return the mean cosine of the samples, decoded in this layout, and their BF16 weights."""
    cosines = []
    for sample in samples:
        read = with_layout(sample.linear, layout.codes, layout.scales).read_rows(
            header, sample.first, sample.last
        )
        decoded = read.scheme.dequantize(read.parts)[:, : sample.weight.shape[1]]
        cosines.append(
            F.cosine_similarity(decoded.flatten(), sample.weight.float().flatten(), dim=0)
        )
    return float(torch.stack(cosines).mean())
