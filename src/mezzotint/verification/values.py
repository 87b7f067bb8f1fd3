"""Checks of values: finite and plausible scales, and weights that are neither blank nor saturated.

Tensors are read in blocks, so that a tensor may be larger than memory.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from mezzotint.containers import TensorInfo
from mezzotint.errors import CheckpointError
from mezzotint.formats import Header, StoredLinear
from mezzotint.formats.repacked import RepackedLinear
from mezzotint.loading.blank_layers import (
    BLANK_SCALES,
    BLANK_WEIGHT,
    SCALES,
    blank_codes,
    is_matrix,
)
from mezzotint.schemes import BF16, FP8, FP8_E5M2, FP8_GROUPS, NVFP4, Scheme
from mezzotint.verification.findings import Finding, broken, finding_from_error, suspicious
from mezzotint.verification.statistics import BLOCK_BYTES, Codes, Numbers, add_tensor

NOT_FINITE = "contains a value that is not finite"
MAX_SATURATED_SHARE = 0.5
"""Largest share of codes with the largest magnitude. A sound export has a few percent."""
MAX_SCALE, MIN_SCALE = 1e6, 1e-12
"""Scales of published models lie between 1e-8 and 1e4. The minimum applies only to scales per
tensor, because the scale of a row or block of zeros is arbitrary."""
MIN_NORMAL = 2.0**-126
PERIODS = (8, 16, 32, 64)
"""Bytes per block of codes in the schemes with blocks."""
MIN_SCALES = 32
POWER_OF_TWO_DTYPE = torch.float8_e8m0fnu
"""Block scales of this dtype can all be equal in a sound layer, because they have few values."""


@dataclass
class LayerStatistics:
    """Statistics of a layer's parts. `codes` is None if the weight is stored as numbers."""

    scheme: Scheme
    codes: Codes | None = None
    numbers: dict[str, Numbers] = field(default_factory=dict)


def measure_linear(linear: StoredLinear, header: Header) -> LayerStatistics:
    """Read all parts of a layer and return their statistics.

    Raises  CheckpointError if a part is missing or malformed, or a scale has no usable value
    """
    linear.check(header)
    if isinstance(linear, RepackedLinear):
        return _measure_repacked(linear, header)
    statistics = LayerStatistics(linear.scheme)
    for part, key in linear.keys.items():
        info = header.tensors[key]
        if part == "codes" and not _is_unquantized(info.storage_dtype):
            statistics.codes = Codes()
            add_tensor(info, statistics.codes)
            check_packed_scales(linear.scheme, info)
            continue
        numbers = Numbers(with_logs=linear.scheme.part(part).scale)
        statistics.numbers[part] = numbers
        add_tensor(_typed(linear, part, info), numbers)
        linear.scheme.check_values(part, numbers.examples(), f"{info.file}: {info.name}")
    return statistics


def check_packed_scales(scheme: Scheme, info: TensorInfo) -> None:
    """Check the scales that lie among a tensor's codes, in blocks of rows. Raises BadScale."""
    if scheme.part("codes").packed_scales is None or not info.nbytes:
        return
    *rows, columns = info.storage_shape
    count = math.prod(rows)
    matrix = replace(info, dtype=torch.uint8, shape=(count, columns))
    step = max(BLOCK_BYTES // columns, 1)
    for first in range(0, count, step):
        values = matrix.slice_rows(first, min(first + step, count)).read()
        scheme.check_values("codes", values, f"{info.file}: {info.name}")


def _measure_repacked(linear: RepackedLinear, header: Header) -> LayerStatistics:
    """Return the statistics of parts that are computed from several tensors."""
    statistics = LayerStatistics(linear.scheme, codes := Codes())
    for part, values in linear.read(header).parts.items():
        if part == "codes":
            codes.add(values)
        else:
            statistics.numbers[part] = Numbers(with_logs=linear.scheme.part(part).scale)
            statistics.numbers[part].add(values)
    return statistics


def _is_unquantized(dtype: torch.dtype) -> bool:
    """Return whether a weight of this dtype is unquantized, as in a calibrated BF16 checkpoint."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _typed(linear: StoredLinear, part: str, info: TensorInfo) -> TensorInfo:
    """Return the tensor with its scheme's dtype, if the file stores raw bytes."""
    dtype = linear.scheme.part(part).dtypes[0]
    return replace(info, dtype=dtype) if info.dtype is torch.uint8 and dtype.itemsize == 1 else info


def check_linear(
    module: str, linear: StoredLinear, header: Header
) -> tuple[LayerStatistics | None, list[Finding]]:
    """Check that a quantized layer's parts are complete, with correct shapes and usable values."""
    try:
        statistics = measure_linear(linear, header)
    except CheckpointError as error:
        return None, [finding_from_error("layers", module, error)]
    findings = [*_check_scales(module, linear, statistics, header)]
    if statistics.codes is not None:
        findings += _check_codes(module, linear, statistics.codes, header)
    for part, numbers in statistics.numbers.items():
        if not numbers.finite:
            findings.append(broken("values", linear.name_of(part), NOT_FINITE))
    return statistics, findings


def _check_scales(
    module: str, linear: StoredLinear, statistics: LayerStatistics, header: Header
) -> Iterator[Finding]:
    for part, message in {"codes": BLANK_WEIGHT, **dict.fromkeys(SCALES, BLANK_SCALES)}.items():
        if (numbers := statistics.numbers.get(part)) is not None and numbers.are_zero:
            yield suspicious("values", module, message)
            return
    for part, numbers in statistics.numbers.items():
        is_factor = linear.scheme.part(part).scale and part != "global_divisor"
        if is_factor and (value := _implausible_scale(numbers)) is not None:
            message = f"contains {value:g}, and no known model has such a scale"
            yield suspicious("scales", linear.name_of(part), message)
    blocks = statistics.numbers.get("block_scale")
    if blocks is None or blocks.count < MIN_SCALES or blocks.lowest != blocks.highest:
        return
    info = header.tensors.get(linear.name_of("block_scale"))
    if info is None or info.dtype not in (POWER_OF_TWO_DTYPE, torch.uint8):
        yield suspicious("scales", module, f"all its block scales are {blocks.highest:g}")


def _implausible_scale(scales: Numbers) -> float | None:
    """Return a scale that no known model has, or None."""
    if not scales.finite or not scales.count:
        return None
    if scales.highest > MAX_SCALE:
        return scales.highest
    minimum = MIN_SCALE if scales.count == 1 else 0.0
    return scales.highest if 0 < scales.highest < max(minimum, MIN_NORMAL) else None


def _check_codes(
    module: str, linear: StoredLinear, codes: Codes, header: Header
) -> Iterator[Finding]:
    if linear.scheme is FP8_E5M2 or codes.dtype is torch.float8_e5m2:
        if codes.holds_e5m2_nan():
            yield broken("values", linear.name_of("codes"), "contains a code that is not finite")
    elif linear.scheme in (FP8, FP8_GROUPS) and codes.holds_e4m3_nan():
        yield broken("values", linear.name_of("codes"), "contains a NaN code")
    if codes.only is not None:
        yield suspicious("values", module, blank_codes(codes.only))
        return
    if linear.scheme in (FP8, NVFP4):
        share = _saturated_share(linear.scheme, codes)
        if share > MAX_SATURATED_SHARE:
            message = f"{share:.0%} of its codes have the largest magnitude: it is saturated"
            yield suspicious("values", module, message)
    info = header.tensors.get(linear.name_of("codes"))
    rows = linear.shape[0] if info is None else info.shape[0]
    row_bytes = int(codes.counts.sum()) // max(rows, 1)
    if (period := _period(codes, row_bytes)) is not None:
        message = f"its codes repeat every {period} bytes: all its blocks are equal"
        yield suspicious("values", module, message)


def _saturated_share(scheme: Scheme, codes: Codes) -> float:
    counts = codes.counts
    code = torch.arange(256)
    if scheme is FP8:
        # E4M3: 0x7E is 448, the largest magnitude, and 0x7F is NaN.
        is_largest = ((code & 0x7F) == 0x7E).double()
    else:
        # Two E2M1 codes per byte, each with three magnitude bits.
        is_largest = (((code & 0x07) == 0x07).double() + ((code & 0x70) == 0x70).double()) / 2
    return float((counts * is_largest).sum() / counts.sum().clamp(min=1))


def _period(codes: Codes, row_bytes: int) -> int | None:
    """Return the period of the first codes in bytes, or None."""
    for period in (*PERIODS, row_bytes):
        if 0 < 4 * period <= len(codes.first) and torch.equal(
            codes.first[period:], codes.first[:-period]
        ):
            return period
    return None


def check_smoothing(linears: Mapping[str, StoredLinear]) -> Iterator[Finding]:
    """Yield findings for layers without a pre_quant_scale, if most other layers have one."""
    quantized = {module: linear for module, linear in linears.items() if linear.scheme is not BF16}
    without = [
        module for module, linear in quantized.items() if "pre_quant_scale" not in linear.keys
    ]
    if len(without) >= len(quantized) / 2:
        return
    for module in without:
        message = "has no pre_quant_scale, and most other layers have one; it may be missing"
        yield suspicious("smoothing", module, message)


def check_plain(key: str, info: TensorInfo, packed: Scheme | None = None) -> Iterator[Finding]:
    """Check an unquantized tensor: its values are finite, and a weight matrix is not all zero.

    packed   the scheme of a tensor that is stored in blocks
    """
    if packed is not None:
        try:
            check_packed_scales(packed, info)
        except CheckpointError as error:
            yield finding_from_error("values", key, error)
        return
    if not info.storage_dtype.is_floating_point:
        return
    numbers = Numbers(with_logs=False)
    add_tensor(info, numbers)
    if not numbers.finite:
        yield broken("values", key, NOT_FINITE)
    elif is_matrix(key, info.shape) and numbers.are_zero:
        yield suspicious("values", key, BLANK_WEIGHT)
