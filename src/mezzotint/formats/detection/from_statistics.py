"""The layout under which a file's numbers are most orderly, where nothing else tells and no base is at hand.

Two statistics of trained weights; weights without structure, such as random ones, give neither, and that is said.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mezzotint.formats.contents import Contents, StoredLinear
from mezzotint.formats.detection.evidence import (
    CODE_ORDERS,
    ROWS,
    TILES,
    order_text,
    sample_linears,
    with_layout,
    with_layouts,
)
from mezzotint.formats.header import Header

MIN_Z_SCORE = 6.0
"""Standard errors from chance at which a statistic decides."""
MIN_RATIO = 1.15
"""How much more of the scales' spread rows and columns must explain in one order than in the other."""


def infer_scales(header: Header, contents: Contents) -> Contents:
    """Contents with the block scales in the order in which they are more orderly, or with a sentence that says why not.

    Trained weights have rows and columns of their own size. In the right order the two explain a good part of the
    spread of log(scale); in the wrong order, where each row is made of pieces of four others, less.
    """
    linears, contents = sample_linears(header, contents)
    if not linears:
        return contents
    spread = {order: _explained(header, linears, order) for order in (TILES, ROWS)}
    said = ", ".join(f"{share:.2f} in {order_text(order)}" for order, (share, _) in spread.items())
    best, other = sorted(spread, key=lambda order: -spread[order][0])
    decided = spread[best][1] > MIN_Z_SCORE and spread[best][0] > MIN_RATIO * spread[other][0]
    reason = f"rows and columns explain {said} of the spread of log(scale)"
    return _with_decision(contents, "scales", best if decided else None, reason)


def _explained(header: Header, linears: Sequence[StoredLinear], order: str) -> tuple[float, float]:
    """Mean share of the variance of log(scale) that rows and columns explain, and its distance from chance."""
    shares, surplus, variance = [], 0.0, 0.0
    for linear in linears:
        weight = with_layout(linear, None, order).read_rows(header, 0, min(linear.shape[0], 1024))
        logs = weight.parts["block_scale"].float().clamp(min=2**-9).log()
        share, expected, error = _share(logs)
        shares.append(share)
        surplus, variance = surplus + share - expected, variance + error**2
    return sum(shares) / len(shares), surplus / max(variance, 1e-12) ** 0.5


def _share(values: Tensor) -> tuple[float, float, float]:
    """Of a matrix: the share of its variance that row and column means explain, its mean and deviation by chance."""
    rows, columns = values.shape
    centered = values - values.mean()
    means = columns * centered.mean(1).square().sum() + rows * centered.mean(0).square().sum()
    freedom, total = rows + columns - 2, rows * columns - 1
    chance = freedom / total
    return (
        float(means / centered.square().sum().clamp(min=1e-12)),
        chance,
        (2 * freedom * (1 - chance)) ** 0.5 / total,
    )


@dataclass(frozen=True)
class LayerPairSample:
    """Two layers of which the second reads what the first writes.

    codes     order in which the second one's codes were read
    outputs   log sizes [n] of the first one's rows
    inputs    log sizes [n] of the second one's columns
    """

    codes: str
    outputs: Tensor
    inputs: Tensor


def infer_codes(contents: Contents, links: Sequence[LayerPairSample]) -> Contents:
    """Contents with the nibbles in the order in which layers fit those that feed them, or with a sentence why not.

    Where one layer reads what another writes without much in between (values and the attention's output, both ends of
    a feed-forward), training leaves the columns of the one about as large as the rows of the other. Swapped nibbles
    exchange neighbouring columns, and turn the sign of the correlation between neighbours.
    """
    products = torch.cat([_neighbor_products(link) for link in links]) if links else torch.zeros(0)
    z = float(products.sum() / products.square().sum().sqrt().clamp(min=1e-12))
    said = f"{len(products)} neighbouring columns follow the layers that feed them with z = {z:.1f}"
    if abs(z) < MIN_Z_SCORE:
        return _with_decision(contents, "codes", None, said)
    own = links[0].codes
    order = own if z > 0 else next(order for order in CODE_ORDERS if order != own)
    return _with_decision(contents, "codes", order, said)


def _neighbor_products(link: LayerPairSample) -> Tensor:
    """Products of the differences between columns 2i and 2i+1, in what is written and in what is read."""
    return (link.inputs[0::2] - link.inputs[1::2]) * (link.outputs[0::2] - link.outputs[1::2])


def _with_decision(contents: Contents, what: str, order: str | None, reason: str) -> Contents:
    """Contents with this order in place of the assumed one, and the sentence that says so."""
    if order is None:
        sentence = f"{what}: numbers alone cannot tell ({reason}); name the BF16 model as a base to be certain"
        return replace(contents, evidence=(*contents.evidence, sentence))
    linears = with_layouts(contents.linears, **{what: order})
    kept = tuple(said for said in contents.evidence if not said.startswith(what))
    sentence = f"{what} {order_text(order)}: inferred, {reason}"
    if any(linear.layout != contents.linears[name].layout for name, linear in linears.items()):
        sentence += ", against what its format would have"
    return replace(
        contents, linears=linears, evidence=(*kept, sentence), assumed=contents.assumed - {what}
    )
