"""Check of a layer's static input scale against its recorded inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.quality.recording import InputSample
from mezzotint.schemes.scheme import transform_activation
from mezzotint.tensor import QuantTensor

MAX_FILL = 4.0
"""The scale is too small if an input exceeds the representable range by this factor."""
MIN_FILL = 2.0**-8
"""The scale is too large if the inputs use only this share of the representable range."""


@dataclass(frozen=True)
class InputRange:
    """The effect of a static input scale on a step's input.

    scale        the input scale
    amax         largest magnitude of the input, after the layer's smoothing
    fill         amax as a share of the largest magnitude that the scale can represent
    saturation   share of the inputs above the representable range
    underflow    share of the inputs that this scale, but not a dynamic scale, rounds to zero
    """

    scale: float
    amax: float
    fill: float
    saturation: float
    underflow: float


@dataclass(frozen=True)
class InputScaleProblem:
    """A problem of an input scale. Scores above 1 are suspicious."""

    cause: str
    detail: str
    score: float


def input_range(pieces: Sequence[QuantTensor], sample: InputSample) -> InputRange | None:
    """Return the effect of a layer's input scale on a sample; None without a static scale.

    For several pieces, return the range of the piece with the largest fill.
    """
    widths = [piece.shape[1] for piece in pieces]
    columns = zip(
        pieces,
        torch.split(sample.rows, widths, dim=-1),
        torch.split(sample.amax, widths),
        strict=True,
    )
    ranges = [
        _piece_range(piece, rows, amax)
        for piece, rows, amax in columns
        if piece.scheme.static_scale_part in piece.parts
    ]
    return max(ranges, key=lambda candidate: candidate.fill, default=None)


def _piece_range(piece: QuantTensor, rows: Tensor, amax: Tensor) -> InputRange:
    scheme = piece.scheme
    parts = {name: part.to(rows.device) for name, part in piece.parts.items()}
    scaled = transform_activation(rows, parts)
    largest = float(transform_activation(amax, parts).abs().max())
    scale = float(parts["input_scale"])
    assert scheme.quantize_activation is not None  # noqa: S101
    assert scheme.input_max is not None  # noqa: S101
    limit = scheme.input_max * scale
    static = scheme.quantize_activation(scaled, parts)
    dynamic = scheme.quantize_activation(
        scaled, {name: part for name, part in parts.items() if name != scheme.static_scale_part}
    )
    return InputRange(
        scale=scale,
        amax=largest,
        fill=largest / limit,
        saturation=float((scaled.abs() > limit).float().mean()),
        underflow=float(((static == 0) & (dynamic != 0)).float().mean()),
    )


def find_input_scale_problem(ranges: Sequence[InputRange]) -> InputScaleProblem | None:
    """Return the problem of a layer's input scale over all steps, or None."""
    if not ranges:
        return None
    worst = max(ranges, key=lambda step: step.fill)
    scale, fill = worst.scale, max(worst.fill, 1e-12)
    usage = f"the input reaches {fill:.3g} of the range of input_scale {scale:.3g}"
    score = max(fill / MAX_FILL, MIN_FILL / fill)
    if scale == 1.0:
        return InputScaleProblem(
            "input scale missing", f"it is exactly 1, a loader's default; {usage}", max(1.0, score)
        )
    if score <= 1:
        return None
    # The reciprocal scale multiplies the fill by scale**2.
    if 1 / MAX_FILL <= fill * scale**2 <= MAX_FILL:
        return InputScaleProblem(
            "scale direction inverted", f"{usage}; the reciprocal of input_scale would fit", score
        )
    rates = f"{worst.saturation:.1%} saturate, {worst.underflow:.1%} become zero"
    return InputScaleProblem(
        f"input scale too {'small' if fill > 1 else 'large'}", f"{usage}: {rates}", score
    )
