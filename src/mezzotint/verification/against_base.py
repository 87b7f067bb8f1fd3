"""Comparison of each layer's dequantized weights with the unquantized model, and its outliers."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from mezzotint.checkpoint import Checkpoint
from mezzotint.conversion.tensor_bytes import row_blocks
from mezzotint.schemes import BF16, FP8, schemes
from mezzotint.tensor import dequantize_pieces
from mezzotint.verification.findings import Finding, broken, suspicious

MIN_COSINE = 0.5
"""A wrong nibble order, layout or model gives a cosine near 0; poor quantization gives over 0.9."""
OUTLIER_Z = 6.0
"""An outlier's robust z score, with 1.4826 * MAD as the standard deviation, exceeds this value."""
OUTLIER_RATIO = 1.5
"""An outlier's error also exceeds the median by this factor. Errors of one scheme often differ by a
few percent, so that the z score alone would report harmless differences."""
NEGLIGIBLE = 0.03
"""An outlier's relative error also exceeds this value, which is the error of FP8 quantization."""
MIN_GROUP_SIZE = 8
PLAIN = "plain"


@dataclass(frozen=True)
class LayerError:
    """The error of one layer, or of an unquantized tensor with the scheme "plain".

    relative_error   |W - base| / |base| in the Frobenius norm
    cosine           cosine of W and base
    """

    name: str
    scheme: str
    relative_error: float
    cosine: float


def compare_layer(checkpoint: Checkpoint, module: str, base: Checkpoint) -> LayerError | None:
    """Return the error of a quantized layer; None if the base has no such weight of its shape."""
    name = f"{module}.weight"
    shape = checkpoint.linear_shapes(module)["weight"]
    if name not in base.plain or base.shape(name) != shape:
        return None
    pieces = checkpoint.read(module)
    blocks = map(dequantize_pieces, row_blocks(pieces))
    return _error(module, pieces[0].scheme.name, blocks, base.tensor(name))


def compare_plain(checkpoint: Checkpoint, name: str, base: Checkpoint) -> LayerError | None:
    """Return the error of an unquantized tensor; None if the base has no such tensor."""
    if name not in base.plain or base.shape(name) != checkpoint.shape(name):
        return None
    scheme = FP8.name if checkpoint.is_fp8_cast(name) else PLAIN
    return _error(name, scheme, [checkpoint.tensor(name)], base.tensor(name))


def _error(name: str, scheme: str, blocks: Iterable[Tensor], reference: Tensor) -> LayerError:
    """Sum over blocks of the first dimension in float64, so that no large tensor is in float32."""
    distance = dot = weight_norm = base_norm = 0.0
    start = 0
    for block in blocks:
        weight = block.float()
        expected = (reference[start : start + len(block)] if block.ndim else reference).float()
        start += len(block) if block.ndim else 0
        distance += _square(weight - expected)
        dot += float((weight * expected).sum(dtype=torch.float64))
        weight_norm += _square(weight)
        base_norm += _square(expected)
    if base_norm == 0 or weight_norm == 0:
        equal = distance == 0
        return LayerError(name, scheme, 0.0 if equal else math.inf, 1.0 if equal else 0.0)
    cosine = dot / math.sqrt(weight_norm * base_norm)
    return LayerError(name, scheme, math.sqrt(distance / base_norm), cosine)


def _square(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def find_outliers(errors: Sequence[LayerError], decoded: bool) -> Iterator[Finding]:
    """Yield findings for layers that differ from the base, and for outliers within a scheme.

    decoded   the file says that quantized layers were decoded to BF16, so its unquantized tensors
              may have the error of quantized ones
    """
    by_scheme = {
        scheme: [e.relative_error for e in errors if e.scheme == scheme]
        for scheme in {e.scheme for e in errors}
    }
    any_scheme = max(scheme.usual_error for scheme in schemes().values())
    plain_limit = any_scheme if decoded else BF16.usual_error
    for error in errors:
        numbers = (
            f"relative error {error.relative_error:.3g}, cosine {error.cosine:.4f} against the base"
        )
        if not error.cosine > MIN_COSINE:
            hint = "typical causes: wrong nibble order or scale layout, or a base of another model."
            yield broken("base", error.name, numbers, hint)
        elif error.scheme == PLAIN:
            if error.relative_error > plain_limit:
                yield suspicious("base", error.name, f"is stored unquantized with {numbers}")
        elif reason := _outlier_reason(error, by_scheme[error.scheme]):
            yield suspicious("base", error.name, f"{numbers}: {reason}")


def _outlier_reason(error: LayerError, scheme_errors: Sequence[float]) -> str:
    """Return why a quantized layer's error is suspicious, or an empty string."""
    usual = schemes()[error.scheme].usual_error
    if error.relative_error > usual:
        return f"{error.scheme} layers are usually below {usual}"
    center = median(scheme_errors)
    deviation = 1.4826 * median(abs(e - center) for e in scheme_errors)
    is_small = error.relative_error < max(OUTLIER_RATIO * center, NEGLIGIBLE)
    if len(scheme_errors) < MIN_GROUP_SIZE or is_small:
        return ""
    if error.relative_error - center > OUTLIER_Z * deviation:
        return f"the median of its {len(scheme_errors)} {error.scheme} layers is {center:.3g}"
    return ""
