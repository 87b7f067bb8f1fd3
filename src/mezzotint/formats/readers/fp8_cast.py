"""Read weights cast to FP8 without scales: ComfyUI's `fp8_e4m3fn` files and similar ones.

X.weight e4m3 [out, in], and often all other tensors in e4m3 as well. Inputs stay unquantized.

A file that lost its scales has the same header, but other values: scaling brings the largest weight
of a matrix to 448, and unscaled weights stay far below. So only the values justify a scale of 1.0.
"""

from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch

from mezzotint.containers import TensorInfo
from mezzotint.formats.comfy_metadata import comfy_kitchen_linear
from mezzotint.formats.components import COMFY_METADATA
from mezzotint.formats.contents import (
    PART_SUFFIXES,
    Contents,
    Match,
    NoMatch,
    StoredLinear,
    classify_tensors,
)
from mezzotint.formats.header import Header
from mezzotint.formats.readers import modelopt
from mezzotint.formats.readers.comfy import SCALED_FP8_MARKER
from mezzotint.schemes import FP8
from mezzotint.schemes.scheme import FLOAT_DTYPES

SAMPLES, MAX_UNSCALED_WEIGHT = 8, 64.0
"""Matrices to sample, and the median of their largest weights above which scales were lost."""
SAMPLED = 2**24
"""Values to read of a matrix, at most."""
DECLARATIONS = ("quantization_config", COMFY_METADATA)
ASSUMED_FIELDS = frozenset({"scales"})
"""Assumptions about a file on the Hub, whose values are read only to load it."""


class FP8Cast:
    name = "fp8_cast"
    title = "weights cast to FP8, without scales"

    def detect(self, header: Header) -> Match | NoMatch:
        reason = next(_reasons_against(header), None)
        if reason is not None:
            return NoMatch(reason)
        found = f"{len(_matrices(header))} matrices in e4m3, and nothing has or declares a scale"
        if not header.local:
            return Match(f"{found}: assumed to be casts, because values on the Hub are not read")
        largest = _largest(header)
        if largest > MAX_UNSCALED_WEIGHT:
            return NoMatch(
                f"{found}, but their largest weights are {largest:g}: they lost their scales"
            )
        return Match(f"{found}; their largest weights are {largest:g}, and not 448 as with a scale")

    def contents(self, header: Header) -> Contents:
        linears = {
            linear.module: linear
            for linear in (_linear(header, info) for info in _matrices(header))
        }
        found = replace(classify_tensors(header, linears, {}), unscaled=True)
        return found if header.local else replace(found, assumed=ASSUMED_FIELDS)


FORMAT = FP8Cast()


def _reasons_against(header: Header) -> Iterator[str]:
    """Yield reasons why the file is not a cast, by its header."""
    if not _matrices(header):
        yield "no weight is a matrix in e4m3"
    for info in header.tensors.values():
        if info.dtype not in (*FLOAT_DTYPES, torch.float8_e4m3fn):
            yield f"{info.name} is {info.dtype}"
        if info.name.endswith((*PART_SUFFIXES, SCALED_FP8_MARKER)):
            yield f"{info.name} is there, and cast weights have no scales"
    for where, entries in (("config.json", header.config), ("the header", header.metadata)):
        yield from (f"{where} has {key}" for key in DECLARATIONS if key in entries)
    if modelopt.declared_quantization(header):
        yield "a quantization by ModelOpt is declared"


def _matrices(header: Header) -> list[TensorInfo]:
    infos = header.tensors.values()
    return [
        i
        for i in infos
        if i.name.endswith(".weight") and i.dtype is torch.float8_e4m3fn and len(i.shape) == 2
    ]


def _largest(header: Header) -> float:
    """Return the median of the largest weights in the first values of the smallest matrices."""
    sized = sorted(
        (info for info in _matrices(header) if info.nbytes), key=lambda info: info.nbytes
    )
    return (
        median(float(info.first(SAMPLED).read().float().abs().max()) for info in sized[:SAMPLES])
        if sized
        else 0.0
    )


def _linear(header: Header, info: TensorInfo) -> StoredLinear:
    linear = comfy_kitchen_linear(header, info.name.removesuffix(".weight"), FP8, dynamic=False)
    keys = {part: key for part, key in linear.keys.items() if part != "weight_scale"}
    return replace(linear, keys=keys, implied_values={"weight_scale": 1.0})
