"""A layer's static input scale against the inputs that it is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.quality.recording import Sample
from mezzotint.schemes.int8 import INT8_MAX
from mezzotint.schemes.rounding import E2M1_MAX, E4M3_MAX
from mezzotint.schemes.scheme import scaled_input
from mezzotint.tensor import QuantTensor

LARGEST = {"fp8": E4M3_MAX, "nvfp4": E2M1_MAX * E4M3_MAX, "int8": INT8_MAX}
"""The largest magnitude that each scheme with a static input scale can write, in units of that scale."""
FULL = 4.0
"""How many times the largest magnitude an input may be before the scale is too small."""
EMPTY = 2.0**-8
"""How small an input may be beside the largest magnitude before the scale is too large."""


@dataclass(frozen=True)
class InputRange:
    """How a static input scale meets a step's input.

    scale        the input scale
    amax         the largest magnitude of what is rounded: the input, smoothed where the layer smooths it
    fill         amax as a share of the largest magnitude that the scale leaves room for
    saturation   the share of the inputs above that
    underflow    the share of the inputs that become zero by this scale, and would not by one that fits
    """

    scale: float
    amax: float
    fill: float
    saturation: float
    underflow: float


@dataclass(frozen=True)
class InputFault:
    """What is wrong with an input scale; `score` is 1 where it begins to be suspicious."""

    cause: str
    detail: str
    score: float


def input_range(pieces: Sequence[QuantTensor], sample: Sample) -> InputRange | None:
    """How a layer's input scale meets a sample; None where it has none. Of several pieces, the fullest one's."""
    widths = [piece.shape[1] for piece in pieces]
    columns = zip(pieces, torch.split(sample.rows, widths, dim=-1), torch.split(sample.amax, widths), strict=True)
    ranges = [_piece_range(*own) for own in columns if own[0].scheme.static_input in own[0].parts]
    return max(ranges, key=lambda found: found.fill, default=None)


def _piece_range(piece: QuantTensor, rows: Tensor, amax: Tensor) -> InputRange:
    scheme = piece.scheme
    parts = {name: part.to(rows.device) for name, part in piece.parts.items()}
    scaled = scaled_input(rows, parts)
    largest = float(scaled_input(amax, parts).abs().max())
    scale = float(parts["input_scale"])
    limit = LARGEST[scheme.name] * scale
    assert scheme.quantize_input is not None  # noqa: S101
    static = scheme.quantize_input(scaled, parts)
    dynamic = scheme.quantize_input(scaled, {name: part for name, part in parts.items() if name != scheme.static_input})
    return InputRange(
        scale=scale,
        amax=largest,
        fill=largest / limit,
        saturation=float((scaled.abs() > limit).float().mean()),
        underflow=float(((static == 0) & (dynamic != 0)).float().mean()),
    )


def input_fault(ranges: Sequence[InputRange]) -> InputFault | None:
    """What is wrong with a layer's input scale, by all steps; None if nothing is."""
    if not ranges:
        return None
    worst = max(ranges, key=lambda found: found.fill)
    scale, fill = worst.scale, max(worst.fill, 1e-12)
    said = f"the input reaches {fill:.3g} of the range that input_scale {scale:.3g} gives"
    score = max(fill / FULL, EMPTY / fill)
    if scale == 1.0:
        return InputFault("input scale missing", f"it is exactly 1, a loader's default; {said}", max(1.0, score))
    if score <= 1:
        return None
    if 1 / FULL <= fill * scale**2 <= FULL:
        return InputFault("scale direction inverted", f"{said}; the reciprocal of input_scale would fit", score)
    rates = f"{worst.saturation:.1%} saturate, {worst.underflow:.1%} become zero"
    return InputFault(f"input scale too {'small' if fill > 1 else 'large'}", f"{said}: {rates}", score)
