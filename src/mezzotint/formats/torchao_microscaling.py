"""torchao's NVFP4Tensor and MXTensor: blocks of 16 or 32 columns with an 8-bit scale.

NVFP4Tensor   X._weight_qdata u8 [out, in/2], low nibble first,  X._weight_scale e4m3 [out, in/16],
              maybe X._weight_per_tensor_scale f32 []; without it, the scales are those of blocks
MXTensor      X._weight_qdata e4m3 or e5m2 [out, in],  X._weight_scale e8m0 [out, in/32]

Swizzled scales are in 128x4 tiles, in a tensor of [32 * tiles, 16 * tiles].
Source: https://github.com/pytorch/ao/tree/main/torchao/prototype/mx_formats
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mezzotint.containers import TensorInfo
from mezzotint.errors import MissingTensor, ShapeMismatch, UnreadFormat
from mezzotint.formats.contents import StoredLinear
from mezzotint.formats.header import Header
from mezzotint.formats.repacked import RepackedLinear, stored
from mezzotint.layouts.tiles import from_tiles, padded_shape
from mezzotint.schemes import FP8_GROUPS, MXFP8, NVFP4, Part, Parts, Scheme
from mezzotint.schemes.scheme import FLOAT32, FP8_DTYPES
from mezzotint.tensor import PLAIN

NVFP4_TENSOR, MX_TENSOR = "NVFP4Tensor", "MXTensor"
GROUPS = {NVFP4_TENSOR: 16, MX_TENSOR: 32}
TILE_ROWS, TILE_COLUMNS = 128, 4
E8M0 = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Microscaling:
    """How the entry of a weight describes it.

    group       columns that share a scale
    swizzled    scales are in tiles
    has_outer   there is a scale for the whole matrix
    dynamic     inputs are quantized
    """

    kind: str
    group: int | None
    swizzled: bool
    has_outer: bool
    dynamic: bool


def microscaling_linear(header: Header, module: str, entry: Microscaling) -> StoredLinear:
    """Return a layer of one of both classes. Raises MissingTensor, ShapeMismatch, UnreadFormat."""
    keys = {name: f"{module}._weight_{name}" for name in ("qdata", "scale")}
    keys |= {"outer": f"{module}._weight_per_tensor_scale"} if entry.has_outer else {}
    if keys["qdata"] not in header.tensors:
        raise MissingTensor(f"{header.path}: {keys['qdata']} is not there, and the header has it")
    codes = header.tensors[keys["qdata"]]
    scheme = _scheme(header, codes, entry)
    shape = _shape(codes, entry)
    count = (shape[0], shape[1] // entry.group) if entry.group else (0, 0)
    scales = _swizzled_shape(count) if entry.swizzled else count
    tensors: dict[str, Part] = {
        "qdata": stored((codes.storage_dtype,), (codes.storage_shape,), "codes"),
        "scale": stored(
            (E8M0 if entry.kind == MX_TENSOR else torch.float8_e4m3fn,),
            (scales,),
            "scale of each block",
            scale=True,
        ),
        "outer": stored(FLOAT32, ((), (1,)), "scale of the whole matrix", scale=True),
    }
    keys |= {"bias": f"{module}.bias"} if f"{module}.bias" in header.tensors else {}
    implied = {"global_scale": 1.0} if scheme is NVFP4 and not entry.has_outer else {}
    return RepackedLinear(
        module,
        scheme,
        PLAIN,
        shape,
        keys,
        implied_values=implied,
        dynamic_input=entry.dynamic,
        tensors=tensors,
        repack=partial(_repack, scheme=scheme, count=count, swizzled=entry.swizzled),
    )


def _scheme(header: Header, codes: TensorInfo, entry: Microscaling) -> Scheme:
    """Return the scheme of a class; MXFP8 here always quantizes its input."""
    where = f"{header.path}: {codes.name}"
    if entry.group != GROUPS[entry.kind]:
        raise UnreadFormat(f"{where} has blocks of {entry.group}, expected {GROUPS[entry.kind]}")
    if entry.kind == NVFP4_TENSOR:
        if codes.dtype is not torch.uint8:
            raise ShapeMismatch(f"{where} is {codes.dtype} in an {NVFP4_TENSOR}")
        return NVFP4
    if codes.dtype not in FP8_DTYPES or (entry.dynamic and codes.dtype is torch.float8_e5m2):
        raise UnreadFormat(
            f"{where} is {codes.dtype} in an {MX_TENSOR}, and only FP8 is read",
            "quantize the model to MXFP8 with e4m3, or to NVFP4.",
        )
    return MXFP8 if entry.dynamic else FP8_GROUPS


def _shape(codes: TensorInfo, entry: Microscaling) -> tuple[int, int]:
    columns = (*codes.shape, 0, 0)[1] * (2 if entry.kind == NVFP4_TENSOR else 1)
    if len(codes.shape) != 2 or 0 in codes.shape or columns % GROUPS[entry.kind]:
        raise ShapeMismatch(
            f"{codes.file}: {codes.name} has shape {list(codes.shape)}, expected a matrix of whole "
            f"blocks of {GROUPS[entry.kind]} columns"
        )
    return codes.shape[0], columns


def _swizzled_shape(count: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of tiled scales: torchao counts a tile of 128 x 4 as 32 x 16."""
    return -(-count[0] // TILE_ROWS) * 32, -(-count[1] // TILE_COLUMNS) * 16


def _repack(
    tensors: Parts, scheme: Scheme, count: tuple[int, int], swizzled: bool
) -> dict[str, Tensor]:
    """Return the parts of a weight from torchao's tensors."""
    scale = tensors["scale"]
    if swizzled:
        raw = scale.view(torch.uint8).reshape(padded_shape(*count))
        scale = from_tiles(raw, *count).contiguous().view(scale.dtype)
    if scheme is FP8_GROUPS:
        scale = scale.to(torch.bfloat16)  # BF16 holds all powers of two of E8M0.
    parts = {"codes": tensors["qdata"], "block_scale": scale}
    parts |= {"global_scale": tensors["outer"]} if "outer" in tensors else {}
    return parts | ({"bias": tensors["bias"]} if "bias" in tensors else {})
