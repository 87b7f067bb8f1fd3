"""Numbers: scales that are finite, positive and possible, and weights that are neither all alike nor saturated.

Every tensor is looked at in blocks, so that none has to fit into the memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from mezzotint.blank import BLANK_SCALES, BLANK_WEIGHT, SCALES, blank_codes, is_matrix
from mezzotint.errors import CheckpointError
from mezzotint.formats import Header, StoredLinear
from mezzotint.formats.safetensors_file import TensorInfo
from mezzotint.schemes import BF16, FP8, NVFP4, Scheme
from mezzotint.verifying.findings import Finding, broken, of_error, suspicious
from mezzotint.verifying.statistics import Codes, Numbers, look

SATURATED = 0.5
"""Share of codes at the largest magnitude; a sound export has a few in a hundred."""
LARGEST_SCALE, SMALLEST_SCALE = 1e6, 1e-12
"""Scales of published models lie within 1e-8 and 1e4; the smallest is of single numbers, as blank rows have any."""
SUBNORMAL = 2.0**-126
PERIODS = (8, 16, 32, 64)
"""Bytes of a block of codes, in the schemes that have blocks."""
FEWEST_SCALES = 32
POWERS_OF_TWO = torch.float8_e8m0fnu
"""Block scales that may be all alike in a sound layer: there are few of them."""


@dataclass
class LayerLook:
    """What was seen of a sound layer's parts; `codes` is None where its weights are stored as numbers."""

    scheme: Scheme
    codes: Codes | None = None
    numbers: dict[str, Numbers] = field(default_factory=dict)


def look_at_linear(linear: StoredLinear, header: Header) -> LayerLook:
    """Look at all parts of a layer.

    Raises  CheckpointError where a part is missing or malformed, or a scale is no usable number
    """
    linear.check(header)
    seen = LayerLook(linear.scheme)
    for part, key in linear.keys.items():
        info = header.tensors[key]
        if part == "codes" and not _is_number(info.dtype):
            seen.codes = Codes()
            look(info, seen.codes)
            continue
        seen.numbers[part] = Numbers(with_logs=linear.scheme.part(part).scale)
        look(_numbers(linear, part, info), seen.numbers[part])
        linear.scheme.check_values(part, seen.numbers[part].examples(), f"{info.file}: {info.name}")
    return seen


def _is_number(dtype: torch.dtype) -> bool:
    """Whether a layer's weight of this dtype is no code: an unquantized one, which calibration stands beside."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _numbers(linear: StoredLinear, part: str, info: TensorInfo) -> TensorInfo:
    """The tensor in the dtype that its scheme reads raw bytes as."""
    dtype = linear.scheme.part(part).dtypes[0]
    return replace(info, dtype=dtype) if info.dtype is torch.uint8 and dtype.itemsize == 1 else info


def check_linear(module: str, linear: StoredLinear, header: Header) -> tuple[LayerLook | None, list[Finding]]:
    """One quantized layer's parts: complete, of the right shapes, and with usable values."""
    try:
        seen = look_at_linear(linear, header)
    except CheckpointError as error:
        return None, [of_error("layers", module, error)]
    found = [*_check_scales(module, linear, seen, header)]
    if seen.codes is not None:
        found += _check_codes(module, linear, seen.codes, header)
    for part, numbers in seen.numbers.items():
        if not numbers.finite:
            found.append(broken("values", linear.keys[part], "holds a value that is not finite"))
    return seen, found


def _check_scales(module: str, linear: StoredLinear, seen: LayerLook, header: Header) -> Iterator[Finding]:
    for part, message in {"codes": BLANK_WEIGHT, **dict.fromkeys(SCALES, BLANK_SCALES)}.items():
        if (numbers := seen.numbers.get(part)) is not None and numbers.are_zero:
            yield suspicious("values", module, message)
            return
    for part, numbers in seen.numbers.items():
        if linear.scheme.part(part).scale and (value := _absurd(numbers)) is not None:
            yield suspicious("scales", linear.keys[part], f"holds {value:g}, and no known model has such a scale")
    blocks = seen.numbers.get("block_scale")
    if blocks is None or blocks.count < FEWEST_SCALES or blocks.lowest != blocks.highest:
        return
    if header.tensors[linear.keys["block_scale"]].dtype not in (POWERS_OF_TWO, torch.uint8):
        yield suspicious("scales", module, f"every one of its block scales is {blocks.highest:g}")


def _absurd(scales: Numbers) -> float | None:
    """A scale that no model has, or None."""
    if not scales.finite or not scales.count:
        return None
    if scales.highest > LARGEST_SCALE:
        return scales.highest
    smallest = SMALLEST_SCALE if scales.count == 1 else 0.0
    return scales.highest if 0 < scales.highest < max(smallest, SUBNORMAL) else None


def _check_codes(module: str, linear: StoredLinear, codes: Codes, header: Header) -> Iterator[Finding]:
    if linear.scheme is FP8 and codes.holds_e4m3_nan():
        yield broken("values", linear.keys["codes"], "holds a code that is not a number")
    if codes.only is not None:
        yield suspicious("values", module, blank_codes(codes.only))
        return
    if linear.scheme in (FP8, NVFP4) and (share := _saturated(linear.scheme, codes)) > SATURATED:
        yield suspicious("values", module, f"{share:.0%} of its codes are at the largest magnitude: it is saturated")
    shape = header.tensors[linear.keys["codes"]].shape
    row = header.tensors[linear.keys["codes"]].nbytes // max(shape[0], 1)
    if (period := _period(codes, row)) is not None:
        yield suspicious("values", module, f"its codes repeat every {period} bytes: all its blocks are the same")


def _saturated(scheme: Scheme, codes: Codes) -> float:
    counts = codes.counts
    code = torch.arange(256)
    if scheme is FP8:
        most = ((code & 0x7F) == 0x7E).double()
    else:
        most = (((code & 0x07) == 0x07).double() + ((code & 0x70) == 0x70).double()) / 2
    return float((counts * most).sum() / counts.sum().clamp(min=1))


def _period(codes: Codes, row: int) -> int | None:
    """After how many bytes the codes repeat, or None."""
    for period in (*PERIODS, row):
        if 0 < 4 * period <= len(codes.first) and torch.equal(codes.first[period:], codes.first[:-period]):
            return period
    return None


def check_smoothing(linears: Mapping[str, StoredLinear]) -> Iterator[Finding]:
    """Layers without the factor of their input that the others of their scheme have."""
    quantized = {module: linear for module, linear in linears.items() if linear.scheme is not BF16}
    lacking = [module for module, linear in quantized.items() if "pre_quant_scale" not in linear.keys]
    for module in lacking if len(lacking) < len(quantized) / 2 else ():
        yield suspicious("smoothing", module, "has no pre_quant_scale, and most other layers have one: is it lost?")


def check_plain(key: str, info: TensorInfo) -> Iterator[Finding]:
    """A tensor that is stored as it is: finite, and no weight matrix of zeros."""
    if not info.dtype.is_floating_point:
        return
    seen = Numbers(with_logs=False)
    look(info, seen)
    if not seen.finite:
        yield broken("values", key, "holds a value that is not finite")
    elif is_matrix(key, info.shape) and seen.are_zero:
        yield suspicious("values", key, BLANK_WEIGHT)
