"""Infer the layout from statistics of trained weights, where no header and no base decides it.

Weights without structure, such as random ones, show no layout. The evidence then says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mezzotint.formats.contents import Contents, StoredLinear
from mezzotint.formats.detection.evidence import (
    CODE_ORDERS,
    ROWS,
    ROWS_EVIDENCE,
    TILES,
    assume_code_order,
    order_text,
    sample_linears,
    with_layout,
    with_layouts,
)
from mezzotint.formats.detection.from_base import UNLIKE_FORMAT
from mezzotint.formats.header import Header

MIN_Z_SCORE = 6.0
"""Standard errors from chance at which a statistic decides."""
MIN_RATIO = 1.15
"""Ratio of the explained variances of log(scale) at which the better order decides."""
SAMPLED_ROWS = 1024
MIN_SCALE = 2**-9
"""The smallest positive e4m3 value; it replaces scales of 0, which have no logarithm."""


def infer_scales(header: Header, contents: Contents) -> Contents:
    """Infer the order of block scales; evidence says which order, or why none was found.

    In trained weights, rows and columns differ in size. In the right order, row and column means
    explain much of the variance of log(scale). In the wrong order, a row mixes pieces of four
    rows, and the means explain less.
    """
    linears, contents = sample_linears(header, contents)
    if not linears:
        return contents
    found = {order: _explained_variance(header, linears, order) for order in (TILES, ROWS)}
    best, alternative = sorted(found, key=lambda order: -found[order][0])
    share, z_score = found[best]
    decided = z_score > MIN_Z_SCORE and share > MIN_RATIO * found[alternative][0]
    shares = ", ".join(f"{share:.2f} in {order_text(order)}" for order, (share, _) in found.items())
    reason = f"rows and columns explain {shares} of the variance of log(scale)"
    decision = _with_decision(contents, "scales", best if decided else None, reason)
    return _follow_rows(decision) if decided and best == ROWS else decision


def _follow_rows(contents: Contents) -> Contents:
    """Assume the order of codes that row-major scales come with, where it was only assumed."""
    if "codes" not in contents.assumed:
        return contents
    kept = tuple(sentence for sentence in contents.evidence if not sentence.startswith("codes"))
    return assume_code_order(replace(contents, evidence=kept), ROWS_EVIDENCE)


def _explained_variance(
    header: Header, linears: Sequence[StoredLinear], order: str
) -> tuple[float, float]:
    """Return the mean share of the variance of log(scale) that row and column means explain.

    The second number is the distance of that share from chance, in standard errors.
    """
    shares, excess, variance = [], 0.0, 0.0
    for linear in linears:
        rows = min(linear.shape[0], SAMPLED_ROWS)
        weight = with_layout(linear, None, order).read_rows(header, 0, rows)
        logs = weight.parts["block_scale"].float().clamp(min=MIN_SCALE).log()
        share, expected, deviation = _explained_share(logs)
        shares.append(share)
        excess, variance = excess + share - expected, variance + deviation**2
    return sum(shares) / len(shares), excess / max(variance, 1e-12) ** 0.5


def _explained_share(values: Tensor) -> tuple[float, float, float]:
    """Return the share of a matrix's variance that its row and column means explain.

    Also return the mean and the standard deviation of that share by chance: it is the R^2 of an
    additive two-way analysis of variance, which has a beta distribution for normal values.
    """
    rows, columns = values.shape
    centered = values - values.mean()
    means = columns * centered.mean(1).square().sum() + rows * centered.mean(0).square().sum()
    freedom, total = rows + columns - 2, rows * columns - 1
    expected = freedom / total
    return (
        float(means / centered.square().sum().clamp(min=1e-12)),
        expected,
        (2 * freedom * (1 - expected)) ** 0.5 / total,
    )


@dataclass(frozen=True)
class LayerPairSample:
    """Two layers: the second reads the outputs of the first.

    codes     order in which the codes of the second were read
    outputs   log sizes of the first layer's rows [n]
    inputs    log sizes of the second layer's columns [n]
    """

    codes: str
    outputs: Tensor
    inputs: Tensor


def infer_codes(contents: Contents, pairs: Sequence[LayerPairSample]) -> Contents:
    """Infer the order of nibbles from pairs of layers; evidence says which order, or why none.

    Training gives the columns of a layer sizes similar to those of the rows that feed it, if
    little lies between the two: value and output projections, or both ends of a feed-forward.
    Swapped nibbles exchange adjacent columns, which turns the sign of that correlation.
    """
    covariances = torch.cat([_covariances(pair) for pair in pairs]) if pairs else torch.zeros(0)
    z = float(covariances.sum() / covariances.square().sum().sqrt().clamp(min=1e-12))
    reason = (
        f"{len(covariances)} pairs of adjacent columns follow the layers that feed them "
        f"with z = {z:.1f}"
    )
    if abs(z) < MIN_Z_SCORE:
        return _with_decision(contents, "codes", None, reason)
    read = pairs[0].codes
    order = read if z > 0 else next(order for order in CODE_ORDERS if order != read)
    return _with_decision(contents, "codes", order, reason)


def _covariances(pair: LayerPairSample) -> Tensor:
    """Multiply, for columns 2i and 2i+1, the differences of their log sizes in both layers."""
    return (pair.inputs[0::2] - pair.inputs[1::2]) * (pair.outputs[0::2] - pair.outputs[1::2])


def _with_decision(contents: Contents, field: str, order: str | None, reason: str) -> Contents:
    """Replace the assumed order of `field`, or keep it if `order` is None; add the evidence.

    field   "codes" or "scales"
    """
    if order is None:
        sentence = (
            f"{field}: values alone cannot tell ({reason}); "
            "name the BF16 model as a base to be certain"
        )
        return replace(contents, evidence=(*contents.evidence, sentence))
    linears = with_layouts(contents.linears, **{field: order})
    kept = tuple(sentence for sentence in contents.evidence if not sentence.startswith(field))
    sentence = f"{field} {order_text(order)}: inferred, {reason}"
    if any(linear.layout != contents.linears[name].layout for name, linear in linears.items()):
        sentence += f", {UNLIKE_FORMAT}"
    return replace(
        contents, linears=linears, evidence=(*kept, sentence), assumed=contents.assumed - {field}
    )
