"""Weights cast to FP8 as they are, without any scale: ComfyUI's `fp8_e4m3fn` files and checkpoints saved in that dtype.

X.weight e4m3 [out, in], and often all other tensors in e4m3 as well. Inputs are left alone.

A file that has lost its scales has the same header. Its numbers differ: whatever scales a matrix brings its largest
weight to 448, and a model's own weights stay far below. So no scale is taken to be 1.0 unless the numbers say it.
"""

from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch

from mezzotint.formats import modelopt
from mezzotint.formats.comfy import LEGACY
from mezzotint.formats.components import COMFY_NOTE
from mezzotint.formats.contents import PARTS, Contents, Match, NoMatch, StoredLinear, sort_out
from mezzotint.formats.header import Header
from mezzotint.formats.notes import kitchen_linear
from mezzotint.formats.safetensors_file import TensorInfo
from mezzotint.schemes import FP8
from mezzotint.schemes.scheme import FLOATS

SAMPLES, LARGEST = 8, 64.0
"""How many matrices are looked at, and the median of their largest weights above which they must have had scales."""
SAMPLED = 2**24
"""Values of each that are read at most."""
DECLARATIONS = ("quantization_config", COMFY_NOTE)
NOT_READ = frozenset({"scales"})
"""What is assumed of a file on the Hub, whose numbers are read only to load."""


class Cast:
    name = "cast"
    title = "weights cast to FP8, without scales"

    def detect(self, header: Header) -> Match | NoMatch:
        reason = next(_against(header), None)
        if reason is not None:
            return NoMatch(reason)
        found = f"{len(_matrices(header))} matrices in e4m3, and nothing has or declares a scale"
        if not header.local:
            return Match(f"{found}: cast as they are, which the numbers would tell, and they are not read on the Hub")
        largest = _largest(header)
        if largest > LARGEST:
            return NoMatch(f"{found}, but their largest weights are {largest:g}: they had scales, which are lost")
        return Match(f"{found}; their largest weights are {largest:g}, and not 448 as with a scale")

    def contents(self, header: Header) -> Contents:
        linears = {linear.module: linear for linear in (_linear(header, info) for info in _matrices(header))}
        found = replace(sort_out(header, linears, {}), unscaled=True)
        return found if header.local else replace(found, assumed=NOT_READ)


FORMAT = Cast()


def _against(header: Header) -> Iterator[str]:
    """Why the file is no cast, by its header."""
    if not _matrices(header):
        yield "no weight is a matrix in e4m3"
    for info in header.tensors.values():
        if info.dtype not in (*FLOATS, torch.float8_e4m3fn):
            yield f"{info.name} is {info.dtype}"
        if info.name.endswith((*PARTS, LEGACY)):
            yield f"{info.name} is there, and weights that are cast have no scales"
    for where, said in (("config.json", header.config), ("the header", header.metadata)):
        yield from (f"{where} has {key}" for key in DECLARATIONS if key in said)
    if modelopt.quantization(header):
        yield "a quantization by ModelOpt is declared"


def _matrices(header: Header) -> list[TensorInfo]:
    infos = header.tensors.values()
    return [i for i in infos if i.name.endswith(".weight") and i.dtype is torch.float8_e4m3fn and len(i.shape) == 2]


def _largest(header: Header) -> float:
    """Median of the largest weights of the few matrices that are cheapest to read, of a large one of its beginning."""
    sized = sorted((info for info in _matrices(header) if info.nbytes), key=lambda info: info.nbytes)
    return median(float(info.first(SAMPLED).read().float().abs().max()) for info in sized[:SAMPLES]) if sized else 0.0


def _linear(header: Header, info: TensorInfo) -> StoredLinear:
    linear = kitchen_linear(header, info.name.removesuffix(".weight"), FP8, dynamic=False)
    keys = {part: key for part, key in linear.keys.items() if part != "weight_scale"}
    return replace(linear, keys=keys, implied={"weight_scale": 1.0})
