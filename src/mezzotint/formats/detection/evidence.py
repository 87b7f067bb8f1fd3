"""Arrangement of 4-bit codes and block scales, as far as their shapes show it.

Evidence has one of four strengths:

implied    only one arrangement has the shape
measured   only one arrangement agrees with known BF16 weights
inferred   the values look like trained weights in one arrangement, and less so in the others
assumed    nothing but the habit of the format's writers
"""

from collections.abc import Mapping
from dataclasses import replace

from mezzotint.formats.contents import Contents, StoredLinear
from mezzotint.formats.header import Header
from mezzotint.layouts import plain_shape
from mezzotint.schemes import MXFP8, NVFP4

TILES, ROWS = "tiles_128x4", "row_major"
CODE_ORDERS = ("low_first", "high_first")
ROWS_EVIDENCE = (
    "codes low first: as every known tool writes them that leaves scales row major, not verified"
)
AMBIGUOUS_SCHEMES = (NVFP4, MXFP8)
"""Schemes that are written in several arrangements."""
SAMPLES = 4
"""Layers to read where their values decide."""


def detect_scale_layout(header: Header, contents: Contents) -> Contents:
    """Decide from shapes whether block scales are in tiles; keep the order if both are possible."""
    blocked = [linear for linear in contents.linears.values() if linear.scheme in AMBIGUOUS_SCHEMES]
    if not blocked:
        return contents
    for order, alternative in ((TILES, ROWS), (ROWS, TILES)):
        proving = [
            linear
            for linear in blocked
            if fits(linear, header, order) and not fits(linear, header, alternative)
        ]
        if proving:
            key = proving[0].keys["block_scale"]
            sentence = (
                f"scales {order_text(order)}: implied, the shapes in {len(proving)} layers allow "
                f"no other order ({key} is {list(header.tensors[key].shape)})"
            )
            return replace(
                contents,
                linears=with_layouts(contents.linears, scales=order),
                evidence=(*contents.evidence, sentence),
            )
    order = blocked[0].layout.scales
    sentence = f"scales {order_text(order)}: assumed from the format; shapes allow both orders"
    return replace(
        contents, evidence=(*contents.evidence, sentence), assumed=contents.assumed | {"scales"}
    )


def assume_code_order(contents: Contents, evidence: str) -> Contents:
    """Mark the order of the 4-bit codes as assumed, if there are any, with `evidence` for it.

    Beside row-major scales the order is low first instead.
    """
    scales = {each.layout.scales for each in contents.linears.values() if each.scheme is NVFP4}
    if not scales:
        return contents
    if scales == {ROWS}:
        linears = with_layouts(contents.linears, codes=CODE_ORDERS[0])
        contents, evidence = replace(contents, linears=linears), ROWS_EVIDENCE
    return replace(
        contents, evidence=(evidence, *contents.evidence), assumed=contents.assumed | {"codes"}
    )


def with_layouts(
    linears: Mapping[str, StoredLinear], codes: str | None = None, scales: str | None = None
) -> dict[str, StoredLinear]:
    """Return the linears with these orders of codes and block scales; None keeps an order."""
    return {name: with_layout(linear, codes, scales) for name, linear in linears.items()}


def with_layout(linear: StoredLinear, codes: str | None, scales: str | None) -> StoredLinear:
    """Return the linear with these orders of codes and block scales; None keeps an order."""
    layout = linear.layout
    if codes is not None and linear.scheme is NVFP4:
        layout = replace(layout, codes=codes)
    if scales is not None and linear.scheme in AMBIGUOUS_SCHEMES:
        layout = replace(layout, scales=scales)
    return replace(linear, layout=layout)


def fits(linear: StoredLinear, header: Header, order: str) -> bool:
    """Return whether the block scales have a shape that they can have in this order."""
    info = header.tensors.get(linear.keys["block_scale"])
    if info is None:
        return False
    layout = replace(linear.layout, scales=order)
    shape = plain_shape(linear.scheme, layout, "block_scale", linear.shape, info.shape)
    return shape is not None and shape in linear.scheme.part("block_scale").shapes(*linear.shape)


def sample_linears(header: Header, contents: Contents) -> tuple[list[StoredLinear], Contents]:
    """Return up to SAMPLES linears of ambiguous schemes, and contents with the problems found.

    These are the linears that cost the least to read. A linear with an unusable scale is skipped
    and becomes a problem; at most SAMPLES are skipped.
    """
    complete = [
        linear
        for linear in contents.linears.values()
        if linear.scheme in AMBIGUOUS_SCHEMES and linear.is_complete(header)
    ]
    cheapest = sorted(complete, key=lambda linear: linear.shape[0] * linear.shape[1])[: 2 * SAMPLES]
    problems = {
        linear.module: problem for linear in cheapest if (problem := linear.scale_problem(header))
    }
    samples = [linear for linear in cheapest if linear.module not in problems][:SAMPLES]
    return samples, replace(contents, problems={**contents.problems, **problems})


def order_text(order: str) -> str:
    """Return the name of an order as text."""
    return order.replace("_", " ")
