"""Measure the order of vectors in a row-major SVDQuant file against its BF16 weights."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from mezzotint.errors import UnknownFormat
from mezzotint.formats.contents import Contents, StoredLinear
from mezzotint.formats.detection.from_base import Sample
from mezzotint.formats.detection.svdquant_order import FRAGMENTS, ROW_LAYOUT, has_whole_fragments
from mezzotint.formats.header import Header
from mezzotint.schemes import AWQ_W4A16

MAX_ERROR, MIN_RATIO = 0.5, 1.1
"""Largest relative error of the right weights, and the ratio of both errors that decides.

In the golden NVFP4 file of FLUX.1, the errors are 0.05 in the right order and 0.23 in the wrong
one. If the values of smooth are nearly equal, both orders give nearly the same weights.
"""


def row_major_linears(contents: Contents) -> list[StoredLinear]:
    """Return the row-major SVDQuant layers, if their vectors can be in either order.

    The list is empty if a layer has an incomplete fragment: its vectors are in plain order.
    """
    linears = [linear for linear in contents.linears.values() if _is_row_major(linear)]
    return linears if all(has_whole_fragments(linear) for linear in linears) else []


def detect_vector_order(
    header: Header, contents: Contents, samples: Sequence[Sample], base: str
) -> Contents:
    """Return the contents with the order of vectors under which the samples agree with BF16.

    If both orders agree equally well, the order is not changed.

    Raises  UnknownFormat if the samples agree under neither
    """
    errors = {order: _error(header, samples, order) for order in ROW_LAYOUT}
    listed = (
        f"relative error {errors['plain']:.3f} row-major, {errors[FRAGMENTS]:.3f} in fragment order"
    )
    best, alternative = sorted(errors, key=lambda order: errors[order])
    if not errors[best] < MAX_ERROR:
        raise UnknownFormat(
            f"{header.path}: its weights agree with {base} in neither order of vectors ({listed})",
            "is the base of the same model?",
        )
    evidence = f"vectors measured on {len(samples)} layers against {base}: {listed}"
    if errors[alternative] < MIN_RATIO * errors[best]:
        undecided = f"{evidence}, which does not decide"
        return replace(contents, evidence=(*contents.evidence, undecided))
    linears = {
        name: replace(linear, layout=ROW_LAYOUT[best]) if _is_row_major(linear) else linear
        for name, linear in contents.linears.items()
    }
    return replace(
        contents,
        linears=linears,
        evidence=(*contents.evidence, evidence),
        assumed=contents.assumed - {"vectors"},
    )


def _is_row_major(linear: StoredLinear) -> bool:
    return linear.layout in ROW_LAYOUT.values() and linear.scheme is not AWQ_W4A16


def _error(header: Header, samples: Sequence[Sample], order: str) -> float:
    """Return the mean relative error of the samples with their vectors read in this order."""
    errors = []
    for sample in samples:
        linear = replace(sample.linear, layout=ROW_LAYOUT[order])
        read = linear.to_plain(linear.read(header)).select_rows(
            torch.arange(sample.first, sample.last)
        )
        decoded = read.scheme.dequantize(read.parts)
        columns = min(decoded.shape[1], sample.weight.shape[1])
        weight = sample.weight[:, :columns].float()
        errors.append(torch.linalg.norm(decoded[:, :columns] - weight) / torch.linalg.norm(weight))
    return float(torch.stack(errors).mean())
