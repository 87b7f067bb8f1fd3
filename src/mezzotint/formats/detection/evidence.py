"""How the bytes of a file's 4-bit weights and block scales are arranged, as far as shapes tell.

Evidence comes in four strengths. *Implied*: a shape that only one arrangement allows. *Measured*: numbers agree with
known BF16 weights under one arrangement alone. *Inferred*: numbers are more orderly under one arrangement than under
the others, as trained weights are. *Assumed*: nothing but the habit of the format's writers.
"""

from collections.abc import Mapping
from dataclasses import replace

from mezzotint.formats.contents import Contents, StoredLinear
from mezzotint.formats.header import Header
from mezzotint.layouts import plain_shape
from mezzotint.schemes import MXFP8, NVFP4

TILES, ROWS = "tiles_128x4", "row_major"
CODE_ORDERS = ("low_first", "high_first")
AMBIGUOUS_SCHEMES = (NVFP4, MXFP8)
"""Schemes that are written in several arrangements."""
SAMPLES = 4
"""How many layers are read where numbers have to decide."""


def detect_scale_layout(header: Header, contents: Contents) -> Contents:
    """Decide from shapes whether block scales lie in tiles; where every shape allows both, linears keep their order."""
    blocked = [linear for linear in contents.linears.values() if linear.scheme in AMBIGUOUS_SCHEMES]
    if not blocked:
        return contents
    for order, other in ((TILES, ROWS), (ROWS, TILES)):
        only = [
            linear
            for linear in blocked
            if fits(linear, header, order) and not fits(linear, header, other)
        ]
        if only:
            key = only[0].keys["block_scale"]
            shape = list(header.tensors[key].shape)
            said = f"scales {order_text(order)}: implied, {len(only)} have a shape that allows nothing else"
            linears = with_layouts(contents.linears, scales=order)
            return replace(
                contents,
                linears=linears,
                evidence=(*contents.evidence, f"{said} ({key} is {shape})"),
            )
    order = blocked[0].layout.scales
    said = f"scales {order_text(order)}: assumed as the format has them, their shapes would allow both orders"
    return replace(
        contents, evidence=(*contents.evidence, said), assumed=contents.assumed | {"scales"}
    )


def assume_code_order(contents: Contents, said: str) -> Contents:
    """Contents with this sentence on the order of their 4-bit codes, which only it vouches for, if they have any."""
    if all(linear.scheme is not NVFP4 for linear in contents.linears.values()):
        return contents
    return replace(
        contents, evidence=(said, *contents.evidence), assumed=contents.assumed | {"codes"}
    )


def with_layouts(
    linears: Mapping[str, StoredLinear], codes: str | None = None, scales: str | None = None
) -> dict[str, StoredLinear]:
    """The same linears with their 4-bit codes and their block scales in these orders, where one is given."""
    return {name: with_layout(linear, codes, scales) for name, linear in linears.items()}


def with_layout(linear: StoredLinear, codes: str | None, scales: str | None) -> StoredLinear:
    layout = linear.layout
    if codes is not None and linear.scheme is NVFP4:
        layout = replace(layout, codes=codes)
    if scales is not None and linear.scheme in AMBIGUOUS_SCHEMES:
        layout = replace(layout, scales=scales)
    return replace(linear, layout=layout)


def fits(linear: StoredLinear, header: Header, order: str) -> bool:
    info = header.tensors.get(linear.keys["block_scale"])
    if info is None:
        return False
    layout = replace(linear.layout, scales=order)
    shape = plain_shape(linear.scheme, layout, "block_scale", linear.shape, info.shape)
    return shape is not None and shape in linear.scheme.part("block_scale").shapes(*linear.shape)


def sample_linears(header: Header, contents: Contents) -> tuple[list[StoredLinear], Contents]:
    """The few sound linears of an ambiguous scheme that are cheapest to read, and contents with what was wrong before.

    A linear with a scale that is no usable number is passed over, but not more of them than a sample has.
    """
    sound = [
        linear
        for linear in contents.linears.values()
        if linear.scheme in AMBIGUOUS_SCHEMES and linear.is_complete(header)
    ]
    cheapest = sorted(sound, key=lambda linear: linear.shape[0] * linear.shape[1])[: 2 * SAMPLES]
    faults = {
        linear.module: fault for linear in cheapest if (fault := linear.scale_problem(header))
    }
    samples = [linear for linear in cheapest if linear.module not in faults][:SAMPLES]
    return samples, replace(contents, problems={**contents.problems, **faults})


def order_text(order: str) -> str:
    return order.replace("_", " ")
