"""Each layer beside its sisters, the other quantized layers of its scheme: what none of them is like is suspicious.

A layer is compared by the sizes of its scales, how far they spread, and how its codes are distributed. What counts as
far is measured by how far the sisters lie from each other, and never less than what published models show.
"""

import math
import re
from collections.abc import Iterator, Mapping
from statistics import median

import torch
from torch import Tensor

from mezzotint.schemes import AWQ_W4A16, FP8, INT8
from mezzotint.verifying.findings import Finding, suspicious
from mezzotint.verifying.values import LayerLook

FEWEST = 6
DEVIATIONS = 8.0
"""How many of the sisters' robust standard deviations, 1.4826 * MAD, a layer must lie from their median."""
LEAST_DISTANCE = {"input_scale": 10.0, "scale": 6.6, "spread": 2.0, "entropy": 0.8, "histogram": 0.12}
"""... and at least this: factors of 1,000 and 100 and a spread as log2; bits; share of the codes that differ."""
IN_A_BLOCK = re.compile(r"\.\d+\.")
FINGERPRINT_BYTES = 2**10
"""Fewer codes may be alike by chance, or by design."""


def compare_sisters(looks: Mapping[str, LayerLook]) -> Iterator[Finding]:
    """Layers of blocks that are unlike all others of their scheme, and layers that hold another's codes."""
    yield from _copies(looks)
    for scheme in {look.scheme.name: look.scheme for look in looks.values()}.values():
        sisters = {
            module: look
            for module, look in looks.items()
            if look.scheme is scheme and IN_A_BLOCK.search(f".{module}.") and not _is_blank(look)
        }
        if len(sisters) >= FEWEST:
            yield from _odd_scales(sisters)
            yield from _odd_codes(sisters)


def _is_blank(look: LayerLook) -> bool:
    return look.codes is None or look.codes.only is not None


def _copies(looks: Mapping[str, LayerLook]) -> Iterator[Finding]:
    """Layers whose codes are those of another, byte for byte as far as counts and beginnings tell."""
    first: dict[tuple[object, ...], str] = {}
    for module, look in looks.items():
        if look.codes is None or look.codes.only is not None or len(look.codes.first) < FINGERPRINT_BYTES:
            continue
        print_ = tuple(look.codes.counts.tolist()), bytes(look.codes.first[:FINGERPRINT_BYTES].tolist())
        if (other := first.setdefault(print_, module)) != module:
            yield suspicious("sisters", module, f"holds the same codes as {other}")


def _odd_scales(sisters: Mapping[str, LayerLook]) -> Iterator[Finding]:
    parts = sorted({part for look in sisters.values() for part in look.numbers if look.scheme.part(part).scale})
    for part in parts:
        numbers = {module: look.numbers[part] for module, look in sisters.items() if part in look.numbers}
        known = {module: own for module, own in numbers.items() if own.zeros < own.count}
        least = LEAST_DISTANCE["input_scale" if part == "input_scale" else "scale"]
        for module, value, middle in _outliers({module: own.middle for module, own in known.items()}, least):
            message = f"its {part} is {2**value:.3g}, and the median of its {len(known)} sisters is {2**middle:.3g}"
            yield suspicious("sisters", module, message)
        spreads = {module: own.spread for module, own in known.items() if own.count > 1}
        for module, value, middle in _outliers(spreads, LEAST_DISTANCE["spread"]):
            message = f"its {part} spreads over {value:.1f} octaves, and the median of its sisters is {middle:.1f}"
            yield suspicious("sisters", module, message)


def _odd_codes(sisters: Mapping[str, LayerLook]) -> Iterator[Finding]:
    counts = {module: look.codes.counts for module, look in sisters.items() if look.codes is not None}
    scheme = next(iter(sisters.values())).scheme
    if scheme in (FP8, INT8):
        kind, values = "entropy", {module: _entropy(_folded(own, scheme is FP8)) for module, own in counts.items()}
        said = "its codes hold {value:.2f} bits of size, and the median of its sisters is {middle:.2f}"
    elif scheme is AWQ_W4A16:
        return
    else:
        shares = {module: _nibbles(own) for module, own in counts.items()}
        usual = torch.stack([*shares.values()]).median(0).values
        kind, values = "histogram", {module: float((own - usual).abs().sum() / 2) for module, own in shares.items()}
        said = "its codes are distributed unlike those of its sisters: {value:.0%} differ, and usual are {middle:.0%}"
    for module, value, middle in _outliers(values, LEAST_DISTANCE[kind]):
        yield suspicious("sisters", module, said.format(value=value, middle=middle))


def _outliers(values: Mapping[str, float], least: float) -> Iterator[tuple[str, float, float]]:
    """(module, its value, the median) of those that lie farther from the median than anything usual."""
    if len(values) < FEWEST:
        return
    middle = median(values.values())
    spread = 1.4826 * median(abs(value - middle) for value in values.values())
    for module, value in values.items():
        if abs(value - middle) > max(least, DEVIATIONS * spread):
            yield module, value, middle


def _folded(counts: Tensor, is_float: bool) -> Tensor:
    """How often each size occurs: FP8's by exponent, INT8's by absolute value."""
    if is_float:
        return counts.reshape(2, 16, 8).sum((0, 2))
    return counts[:128] + torch.cat((counts[128:129] * 0, counts[129:].flip(0)))


def _nibbles(counts: Tensor) -> Tensor:
    """Share of each of the 16 codes of two in a byte."""
    square = counts.reshape(16, 16).double()
    shares = square.sum(0) + square.sum(1)
    return shares / shares.sum().clamp(min=1)


def _entropy(counts: Tensor) -> float:
    """Bits of information in one value."""
    return float(torch.special.entr(counts.double() / counts.sum().clamp(min=1)).sum()) / math.log(2)
