"""The layout under which a file's numbers agree with the BF16 weights that they were made from."""

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
"""A cosine with the base that only nearly right arrangements reach, and how much larger the error of a wrong one is.

Swapped nibbles bring the cosine to 0. Scales in the wrong order only bring it from 0.995 to 0.992 where all blocks are
about as large: the error, the square root of 1 - cosine^2, then grows from 0.10 to 0.13. Where all scales are alike,
as those of MXFP8 may be, their order makes no difference.
"""


@dataclass(frozen=True)
class Sample:
    """Output features [first, last) of a stored linear, and their BF16 weights [last - first, in], without padding."""

    linear: StoredLinear
    first: int
    last: int
    weight: Tensor


def detect_from_samples(
    header: Header, contents: Contents, samples: Sequence[Sample], base: str
) -> Contents:
    """The arrangement under which the samples agree with their BF16 weights.

    Where two fit alike, it is the one that the format would have.

    Raises  UnknownFormat if they agree under none
    """
    found = [
        (_agreement(header, samples, layout), layout) for layout in _candidates(header, samples)
    ]
    ranked = sorted(found, key=itemgetter(0))
    best, layout = ranked[-1]
    said = "; ".join(f"{layout}: cosine {cosine:.4f}" for cosine, layout in reversed(ranked))
    if not best >= MIN_COSINE:
        raise UnknownFormat(
            f"{header.path}: no arrangement of its bytes agrees with {base} ({said})",
            "is the base of the same model?",
        )
    before = samples[0].linear.layout
    alike = [layout for cosine, layout in ranked if _error(cosine) < ERROR_RATIO * _error(best)]
    layout = next((own for own in alike if own.scales == before.scales), layout)
    against = "" if before == layout else f", against what its format would have ({before})"
    evidence = f"layout measured on {len(samples)} layers against {base}{against}: {said}"
    linears = with_layouts(contents.linears, layout.codes, layout.scales)
    return replace(contents, linears=linears, evidence=(evidence,), assumed=frozenset())


def _error(cosine: float) -> float:
    return math.sqrt(max(1 - cosine**2, 1e-12))


def _candidates(header: Header, samples: Sequence[Sample]) -> list[Layout]:
    orders = [
        order
        for order in (TILES, ROWS)
        if all(fits(sample.linear, header, order) for sample in samples)
    ]
    in_4_bits = any(sample.linear.scheme is NVFP4 for sample in samples)
    codes = CODE_ORDERS if in_4_bits else (samples[0].linear.layout.codes,)
    return [Layout(*layout) for layout in product(codes, orders)]


def _agreement(header: Header, samples: Sequence[Sample], layout: Layout) -> float:
    """Mean cosine between the samples as this layout has them and their BF16 weights."""
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
