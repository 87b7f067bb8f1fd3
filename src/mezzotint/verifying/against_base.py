"""Each layer's real weights beside those of the unquantized model: how far apart, and which stand out."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from mezzotint.checkpoint import Checkpoint
from mezzotint.converting.bytes_of import row_blocks
from mezzotint.schemes import FP8
from mezzotint.tensor import real_weight
from mezzotint.verifying.findings import Finding, broken, suspicious

UNRELATED = 0.5
"""A wrong nibble order, layout or model gives a cosine near 0; a poor quantization more than 0.9."""
OUTLIER = 6.0
"""Robust z score of a layer's error among those of its scheme; 1.4826 * MAD stands for the standard deviation."""
OUTLIER_RATIO = 1.5
"""... and how many times the median it must be, as errors of one scheme often lie within a few per cent."""
NEGLIGIBLE = 0.03
"""... and a relative error that is no fault of any layer: that of rounding to FP8."""
FEWEST = 8
USUAL = {"fp8": 0.08, "nvfp4": 0.25}
"""Relative error above which a scheme's layer is odd by itself: round-to-nearest gives 0.03 and 0.1."""
PLAIN_ERROR = 0.02


@dataclass(frozen=True)
class LayerError:
    """|W - base| / |base| (Frobenius) and the cosine between them; `scheme` is "plain" for an unquantized tensor."""

    name: str
    scheme: str
    relative_error: float
    cosine: float


def compare_layer(checkpoint: Checkpoint, module: str, base: Checkpoint) -> LayerError | None:
    """The error of a quantized layer, or None where the base has no weight of its name and shape."""
    name = f"{module}.weight"
    shape = checkpoint.linear_shapes(module)["weight"]
    if name not in base.plain or base.shape(name) != shape:
        return None
    pieces = checkpoint.read(module)
    return _error(module, pieces[0].scheme.name, map(real_weight, row_blocks(pieces)), base.tensor(name))


def compare_plain(checkpoint: Checkpoint, name: str, base: Checkpoint) -> LayerError | None:
    """The error of a tensor that is stored as it is, or None where the base has none of its name and shape."""
    if name not in base.plain or base.shape(name) != checkpoint.shape(name):
        return None
    scheme = FP8.name if checkpoint.is_cast(name) else "plain"
    return _error(name, scheme, [checkpoint.tensor(name)], base.tensor(name))


def _error(name: str, scheme: str, blocks: Iterable[Tensor], reference: Tensor) -> LayerError:
    """Sums over blocks of the first dimension, in float64."""
    distance = product = own = other = 0.0
    start = 0
    for block in blocks:
        ours = block.float()
        theirs = (reference[start : start + len(block)] if block.ndim else reference).float()
        start += len(block) if block.ndim else 0
        distance += _square(ours - theirs)
        product += float((ours * theirs).sum(dtype=torch.float64))
        own += _square(ours)
        other += _square(theirs)
    if other == 0 or own == 0:
        same = distance == 0
        return LayerError(name, scheme, 0.0 if same else math.inf, 1.0 if same else 0.0)
    return LayerError(name, scheme, math.sqrt(distance / other), product / math.sqrt(own * other))


def _square(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def judge(errors: Sequence[LayerError], decoded: bool) -> Iterator[Finding]:
    """Layers that are not what the base says, and layers that stand out among those of their scheme.

    decoded   the file says that quantized layers were decoded, so its unquantized ones may differ as quantized ones do
    """
    typical = {
        scheme: [e.relative_error for e in errors if e.scheme == scheme] for scheme in {e.scheme for e in errors}
    }
    for error in errors:
        numbers = f"relative error {error.relative_error:.3g}, cosine {error.cosine:.4f} against the base"
        if not error.cosine > UNRELATED:
            hint = "a wrong nibble order or scale layout, or a base of another model, looks like this."
            yield broken("base", error.name, numbers, hint)
        elif error.scheme == "plain" and error.relative_error > (max(USUAL.values()) if decoded else PLAIN_ERROR):
            yield suspicious("base", error.name, f"is stored unquantized with {numbers}")
        elif error.scheme != "plain" and (reason := _odd(error, typical)):
            yield suspicious("base", error.name, f"{numbers}: {reason}")


def _odd(error: LayerError, typical: Mapping[str, Sequence[float]]) -> str:
    """Why a quantized layer's error is odd, or an empty string."""
    usual = USUAL.get(error.scheme)
    if usual is not None and error.relative_error > usual:
        return f"{error.scheme} layers stay below {usual}"
    errors = typical[error.scheme]
    middle = median(errors)
    spread = 1.4826 * median(abs(e - middle) for e in errors)
    if len(errors) < FEWEST or error.relative_error < max(OUTLIER_RATIO * middle, NEGLIGIBLE):
        return ""
    if error.relative_error - middle > OUTLIER * spread:
        return f"the median of its {len(errors)} {error.scheme} layers is {middle:.3g}"
    return ""
