"""Comparison of each layer with the other quantized layers of its scheme; outliers are suspicious.

The compared properties are the magnitude of the scales, their spread and the distribution of the
codes. The limits follow from the spread among the layers, with lower bounds that hold for all
published models.
"""

import math
import re
from collections.abc import Iterator, Mapping
from statistics import median

import torch
from torch import Tensor

from mezzotint.schemes import AWQ_CENTERED, AWQ_W4A16, FP8, FP8_E5M2, INT8, W6A8, Scheme
from mezzotint.verification.findings import Finding, suspicious
from mezzotint.verification.statistics import Numbers
from mezzotint.verification.values import LayerStatistics

CHECK = "outliers"

MIN_GROUP_SIZE = 6
OUTLIER_Z = 8.0
"""Distance of an outlier from the median, in robust standard deviations (1.4826 * MAD)."""
MIN_DISTANCE = {
    "input_scale": 10.0,
    "scale": 6.6,
    "spread": 2.0,
    "entropy": 0.8,
    "histogram": 0.12,
}
"""Smallest distance of an outlier from the median. The units are log2 for input_scale (a factor of
1,000), scale (100) and spread, bits for the entropy, and the differing share of codes for the
histogram."""
MANTISSAS = {FP8.name: 8, FP8_E5M2.name: 4}
"""{scheme: FP8 codes with the same sign and exponent}"""
IN_BLOCK = re.compile(r"\.\d+\.")
FINGERPRINT_BYTES = 2**10
"""Layers with fewer bytes of codes may be equal by chance, or by design."""


def compare_layers(layers: Mapping[str, LayerStatistics]) -> Iterator[Finding]:
    """Yield findings for layers in blocks that are outliers, and for layers with equal codes."""
    yield from _copies(layers)
    for scheme in {layer.scheme.name: layer.scheme for layer in layers.values()}.values():
        # Layers outside of blocks, such as embedders, legitimately differ from all others.
        group = {
            module: layer
            for module, layer in layers.items()
            if layer.scheme is scheme and IN_BLOCK.search(f".{module}.") and not _is_blank(layer)
        }
        if len(group) >= MIN_GROUP_SIZE:
            yield from _scale_outliers(group)
            yield from _code_outliers(scheme, group)


def _is_blank(layer: LayerStatistics) -> bool:
    return layer.codes is None or layer.codes.only is not None


def _copies(layers: Mapping[str, LayerStatistics]) -> Iterator[Finding]:
    """Yield findings for layers with the histogram and the first bytes of another layer's codes."""
    first: dict[tuple[object, ...], str] = {}
    for module, layer in layers.items():
        codes = layer.codes
        if codes is None or codes.only is not None or len(codes.first) < FINGERPRINT_BYTES:
            continue
        fingerprint = (
            tuple(codes.counts.tolist()),
            bytes(codes.first[:FINGERPRINT_BYTES].tolist()),
        )
        if (original := first.setdefault(fingerprint, module)) != module:
            yield suspicious(CHECK, module, f"has the same codes as {original}")


def _scale_outliers(group: Mapping[str, LayerStatistics]) -> Iterator[Finding]:
    scales = {
        part for layer in group.values() for part in layer.numbers if layer.scheme.part(part).scale
    }
    for part in sorted(scales):
        numbers = {
            module: layer.numbers[part] for module, layer in group.items() if part in layer.numbers
        }
        yield from _part_outliers(part, numbers)


def _part_outliers(part: str, numbers: Mapping[str, Numbers]) -> Iterator[Finding]:
    nonzero = {module: values for module, values in numbers.items() if values.zeros < values.count}
    magnitudes = {module: values.mean_log2 for module, values in nonzero.items()}
    distance = MIN_DISTANCE["input_scale" if part == "input_scale" else "scale"]
    for module, value, center in _outliers(magnitudes, distance):
        message = (
            f"its {part} is {2**value:.3g}, and the median of {len(nonzero)} layers "
            f"is {2**center:.3g}"
        )
        yield suspicious(CHECK, module, message)
    spreads = {module: values.spread for module, values in nonzero.items() if values.count > 1}
    for module, value, center in _outliers(spreads, MIN_DISTANCE["spread"]):
        message = (
            f"its {part} has a spread of {value:.1f} octaves, and the median of other layers "
            f"is {center:.1f}"
        )
        yield suspicious(CHECK, module, message)


def _code_outliers(scheme: Scheme, group: Mapping[str, LayerStatistics]) -> Iterator[Finding]:
    counts = {
        module: layer.codes.counts for module, layer in group.items() if layer.codes is not None
    }
    if scheme in (FP8, FP8_E5M2, INT8):
        yield from _entropy_outliers(scheme, counts)
    elif scheme not in (AWQ_W4A16, AWQ_CENTERED, W6A8):
        # AWQ's zero points shift the codes of each group, so that their distributions vary.
        # W6A8's bytes are no pairs of codes.
        yield from _histogram_outliers(counts)


def _entropy_outliers(scheme: Scheme, counts: Mapping[str, Tensor]) -> Iterator[Finding]:
    entropies = {
        module: _entropy(_fold_signs(layer_counts, MANTISSAS.get(scheme.name)))
        for module, layer_counts in counts.items()
    }
    for module, value, center in _outliers(entropies, MIN_DISTANCE["entropy"]):
        message = (
            f"the magnitudes of its codes have an entropy of {value:.2f} bits, "
            f"and the median of other layers is {center:.2f}"
        )
        yield suspicious(CHECK, module, message)


def _histogram_outliers(counts: Mapping[str, Tensor]) -> Iterator[Finding]:
    shares = {module: _nibble_shares(layer_counts) for module, layer_counts in counts.items()}
    usual = torch.stack([*shares.values()]).median(0).values
    distances = {
        module: float((layer_shares - usual).abs().sum() / 2)
        for module, layer_shares in shares.items()
    }
    for module, value, center in _outliers(distances, MIN_DISTANCE["histogram"]):
        message = (
            "the distribution of its codes differs from that of other layers: "
            f"{value:.0%} differ, and {center:.0%} is usual"
        )
        yield suspicious(CHECK, module, message)


def _outliers(
    values: Mapping[str, float], min_distance: float
) -> Iterator[tuple[str, float, float]]:
    """Yield (module, value, median) of the outliers."""
    if len(values) < MIN_GROUP_SIZE:
        return
    center = median(values.values())
    deviation = 1.4826 * median(abs(value - center) for value in values.values())
    for module, value in values.items():
        if abs(value - center) > max(min_distance, OUTLIER_Z * deviation):
            yield module, value, center


def _fold_signs(counts: Tensor, mantissas: int | None) -> Tensor:
    """Return the histogram of magnitudes: of exponents for FP8, of absolute values for INT8.

    mantissas   FP8 codes with the same sign and exponent; None for INT8
    """
    if mantissas is not None:
        return counts.reshape(2, -1, mantissas).sum((0, 2))
    # Codes are bytes in two's complement: 255 is -1. The code -128 has no positive counterpart.
    return counts[:128] + torch.cat((counts[128:129] * 0, counts[129:].flip(0)))


def _nibble_shares(counts: Tensor) -> Tensor:
    """Return the share of each of the 16 codes, with two codes per byte."""
    square = counts.reshape(16, 16).double()
    shares = square.sum(0) + square.sum(1)
    return shares / shares.sum().clamp(min=1)


def _entropy(counts: Tensor) -> float:
    """Return the entropy of one value in bits."""
    nats = torch.special.entr(counts.double() / counts.sum().clamp(min=1)).sum()
    return float(nats) / math.log(2)
