"""Numbers: scales that are finite and positive, and weights that are neither all alike nor all at their largest."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mezzotint.errors import CheckpointError
from mezzotint.formats import Header, StoredLinear
from mezzotint.formats.safetensors_file import TensorInfo
from mezzotint.schemes import BF16, FP8, NVFP4
from mezzotint.verifying.findings import Finding, broken, of_error, suspicious

BLOCK = 2**24
SAMPLE = 2**20
"""How many codes are looked at to tell whether a layer is saturated."""
SATURATED = 0.5
"""Share of codes at the largest magnitude; a sound export has a few in a hundred."""


def check_linear(module: str, linear: StoredLinear, header: Header) -> Iterator[Finding]:
    """One quantized layer's parts: complete, of the right shapes, and with usable values."""
    try:
        linear.check(header)
        parts = linear.read(header).parts
    except CheckpointError as error:
        yield of_error("layers", module, error)
        return
    yield from _check_codes(module, linear, parts["codes"])
    scales = parts.get("block_scale", parts.get("weight_scale"))
    if scales is not None and not bool(scales.float().any()):
        yield suspicious("values", module, "every one of its scales is zero: the layer is blank")
    for name, part in parts.items():
        if part.is_floating_point() and name != "codes" and not _finite(part):
            yield broken("values", linear.keys[name], "holds a value that is not finite")


def _check_codes(module: str, linear: StoredLinear, codes: Tensor) -> Iterator[Finding]:
    raw = codes.reshape(-1).view(torch.uint8)
    if not raw.numel():
        return
    if linear.scheme is FP8 and any(bool(((block & 0x7F) == 0x7F).any()) for block in _split(raw)):
        yield broken("values", linear.keys["codes"], "holds a code that is not a number")
    if int(raw.min()) == int(raw.max()) and raw.numel() > 1:
        yield suspicious("values", module, f"every code is 0x{int(raw[0]):02x}: the layer is blank")
        return
    if linear.scheme in (FP8, NVFP4) and (share := _saturated(linear, raw)) > SATURATED:
        yield suspicious("values", module, f"{share:.0%} of its codes are at the largest magnitude: it is saturated")


def _saturated(linear: StoredLinear, raw: Tensor) -> float:
    sample = raw[:: max(raw.numel() // SAMPLE, 1)]
    if linear.scheme is FP8:
        return float(((sample & 0x7F) == 0x7E).float().mean())
    low, high = (sample & 0x07) == 0x07, (sample & 0x70) == 0x70
    return float((low.float() + high.float()).mean() / 2)


def check_smoothing(linears: Mapping[str, StoredLinear]) -> Iterator[Finding]:
    """Layers without the factor of their input that the others of their scheme have."""
    quantized = {module: linear for module, linear in linears.items() if linear.scheme is not BF16}
    lacking = [module for module, linear in quantized.items() if "pre_quant_scale" not in linear.keys]
    for module in lacking if len(lacking) < len(quantized) / 2 else ():
        yield suspicious("smoothing", module, "has no pre_quant_scale, and most other layers have one: is it lost?")


def check_plain(key: str, info: TensorInfo) -> Iterator[Finding]:
    """A tensor that is stored as it is: finite, and no weight matrix of zeros."""
    values = info.read()
    if not values.is_floating_point():
        return
    if not _finite(values):
        yield broken("values", key, "holds a value that is not finite")
    elif values.ndim == 2 and key.endswith(".weight") and values.numel() and not bool(values.any()):
        yield suspicious("values", key, "is all zeros")


def _finite(values: Tensor) -> bool:
    return all(bool(torch.isfinite(block.float()).all()) for block in _split(values.reshape(-1)))


def _split(flat: Tensor) -> tuple[Tensor, ...]:
    return torch.split(flat, BLOCK) if flat.numel() else ()
