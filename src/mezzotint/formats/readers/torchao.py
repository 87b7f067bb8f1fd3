"""Read torchao's tensors in safetensors, as diffusers and torchao save them.

The header's metadata has an entry for each weight: its class, attributes, and stored tensors.

Int8Tensor                 X._weight_qdata i8 [out, in],  X._weight_scale f32 [out, 1], [1, 1] or
                           [out, in/group],  X._weight_zero_point i8 of that shape
Float8Tensor               X._weight_qdata e4m3 [out, in],  X._weight_scale f32 [out, 1], [1, 1] or
                           [out/128, in/128]
IntxUnpackedToInt8Tensor   X._weight_qdata i8 [out, in] with codes of 2 to 8 bits,
                           X._weight_scale and X._weight_zero_point [out, in/group]

NVFP4Tensor and MXTensor   see `mezzotint.formats.torchao_microscaling`

Classes whose bytes are in the order of one kernel are refused by name.
Source: https://github.com/pytorch/ao/blob/main/torchao/prototype/safetensors/safetensors_support.py
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Len
from pydantic import Field, PositiveInt
from torch import Tensor

from mezzotint.containers import TensorInfo
from mezzotint.errors import BadScale, BrokenFile, MissingTensor, ShapeMismatch, UnreadFormat
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.formats.readers.mezzotint import quantization_config
from mezzotint.formats.repacked import RepackedLinear, scales_of_blocks, stored
from mezzotint.formats.torchao_microscaling import (
    GROUPS,
    MX_TENSOR,
    NVFP4_TENSOR,
    Microscaling,
    microscaling_linear,
)
from mezzotint.schemes import FP8, FP8_GROUPS, INT8, INT_GROUPS, Part, Parts, Scheme, Shape
from mezzotint.schemes.int_groups import pack_codes
from mezzotint.schemes.scheme import FLOAT_DTYPES
from mezzotint.tensor import PLAIN
from mezzotint.untrusted.escaping import shown
from mezzotint.untrusted.json import parse_object
from mezzotint.untrusted.schema import Entries, validated

METHOD = "torchao"
WEIGHT = ".weight"
MAX_ENTRY = 64 * 2**10
"""Bytes of one weight's entry; it has about 400."""
CLASSES = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor", NVFP4_TENSOR, MX_TENSOR)
PLAIN_CLASS = "Tensor"
BYTES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
SYMMETRIC = "SYMMETRIC"


class Attributes(Entries):
    """What a weight's class says besides its tensors."""

    block_size: list[PositiveInt] | PositiveInt | None = None
    is_swizzled_scales: bool = False
    target_dtype: dict[str, Any] = Field(default_factory=dict)
    act_quant_kwargs: dict[str, Any] | None = None
    activation_quantization: str | None = None


class Entry(Entries):
    """A weight's entry in the metadata."""

    type: str = Field(alias="_type")
    data: Attributes = Field(alias="_data", default_factory=Attributes)
    names: Annotated[list[str], Len(max_length=8)] = Field(
        alias="_tensor_data_names", default_factory=list
    )


class TorchAO:
    name = "torchao"
    title = "torchao"

    def detect(self, header: Header) -> Match | NoMatch:
        if "tensor_names" in header.metadata and (found := next(_names(header), None)):
            return Match(f"{found} has an entry of a torchao class in the header", certain=True)
        if quantization_config(header).get("quant_method") == METHOD:
            return Match(f"config.json: quant_method {METHOD}", certain=True)
        return NoMatch("no tensor has an entry of a torchao class in the header")

    def contents(self, header: Header) -> Contents:
        entries = {name: _entry(header, name) for name in _names(header)}
        if not entries:
            raise MissingTensor(
                f"{header.path}: config.json declares {METHOD}, and the header describes no "
                "quantized weight",
                "save the model again with torchao 0.16 or newer, in safetensors.",
            )
        linears = {
            name.removesuffix(WEIGHT): _linear(header, name, entry)
            for name, entry in entries.items()
        }
        counts = Counter(entry.type for entry in entries.values())
        said = " and ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        found = classify_tensors(header, linears, {})
        return Contents(found.linears, found.plain, found.ignored, evidence=(said,))


FORMAT = TorchAO()


def _names(header: Header) -> Iterator[str]:
    """Yield the names of the weights with an entry of a class, unless they are plain tensors."""
    for name, text in header.metadata.items():
        if name.endswith(WEIGHT) and '"_type"' in text and _class(text) != PLAIN_CLASS:
            yield name


def _class(text: str) -> object:
    """Return the class in an entry, "" where it is not JSON: `_entry` refuses that."""
    try:
        entry = json.loads(text[:MAX_ENTRY])
    except (ValueError, RecursionError):
        return ""
    return entry.get("_type") if isinstance(entry, dict) else ""


def _entry(header: Header, name: str) -> Entry:
    where = f"{header.path}: entry of {name} in the header"
    entry = validated(Entry, parse_object(header.metadata[name], where, MAX_ENTRY), where)
    if entry.type not in CLASSES:
        raise UnreadFormat(
            f"{where} has class {shown(entry.type)}, which is not read",
            f"{', '.join(CLASSES)} are read; others have the byte order of one kernel; "
            "quantize the model to one of these classes, or use the BF16 model.",
        )
    extra = {name for name in entry.names if name.startswith("act_")}
    if extra:
        raise UnreadFormat(
            f"{where} has {' and '.join(sorted(extra))}: static scales of inputs are not read",
            "use a file with dynamic or unquantized inputs.",
        )
    return entry


def _linear(header: Header, name: str, entry: Entry) -> StoredLinear:
    module = name.removesuffix(WEIGHT)
    if entry.type in GROUPS:
        return microscaling_linear(header, module, _microscaling(entry))
    keys = {part: f"{module}._weight_{part}" for part in ("qdata", "scale")}
    if entry.type != "Float8Tensor" and ("zero_point" in entry.names or entry.type[:4] == "Intx"):
        keys["zero_point"] = f"{module}._weight_zero_point"
    if f"{module}.bias" in header.tensors:
        keys["bias"] = f"{module}.bias"
    info = header.tensors.get(keys["qdata"])
    if info is None:
        raise MissingTensor(
            f"{header.path}: {keys['qdata']} is not there, and the header describes it",
            "export or download the file again.",
        )
    if len(info.shape) != 2 or 0 in info.shape or info.dtype not in BYTES:
        raise ShapeMismatch(
            f"{info.file}: {info.name} is {info.dtype} {list(info.shape)}, "
            "expected a matrix of 8-bit codes"
        )
    return _of_shape(module, keys, entry, info, header)


def _microscaling(entry: Entry) -> Microscaling:
    size = entry.data.block_size
    return Microscaling(
        entry.type,
        size if isinstance(size, int) else None,
        entry.data.is_swizzled_scales,
        "per_tensor_scale" in entry.names,
        entry.data.act_quant_kwargs is not None,
    )


def _of_shape(
    module: str, keys: dict[str, str], entry: Entry, info: TensorInfo, header: Header
) -> StoredLinear:
    shape = (info.shape[0], info.shape[1])
    block = _block(entry, shape, f"{info.file}: {info.name}")
    whole_rows = block[1] == shape[1] and block[0] in (1, shape[0])
    scheme = _scheme(entry, info, whole_rows, header)
    count = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    shapes: tuple[Shape, ...] = (count, *(((1,), ()) if count == (1, 1) else ()))
    tensors: dict[str, Part] = {
        "qdata": stored((info.storage_dtype,), (shape,), "8-bit codes"),
        "scale": stored(FLOAT_DTYPES, shapes, "scale of each block", scale=True),
        "zero_point": stored((torch.int8,), shapes, "zero point of each block"),
    }
    where = f"{header.path}: {module}"
    return RepackedLinear(
        module,
        scheme,
        PLAIN,
        shape,
        keys,
        dynamic_input=_has_dynamic_input(entry, scheme),
        tensors=tensors,
        repack=partial(_repack, scheme=scheme, block=block, shape=shape, where=where),
    )


def _block(entry: Entry, shape: tuple[int, int], where: str) -> tuple[int, int]:
    """Return the rows and columns that share a scale; an empty block is the whole matrix."""
    sizes = entry.data.block_size
    if not sizes:
        return shape
    if not isinstance(sizes, list) or len(sizes) != 2:
        raise BrokenFile(f"{where}: block_size is {shown(sizes)}, expected two numbers")
    return min(sizes[0], shape[0]), min(sizes[1], shape[1])


def _scheme(entry: Entry, info: TensorInfo, whole_rows: bool, header: Header) -> Scheme:
    """Return the scheme that a class, its codes and its blocks show."""
    expected = entry.type == "Float8Tensor"
    if (info.dtype is not torch.int8) != expected:
        raise ShapeMismatch(f"{info.file}: {info.name} is {info.dtype} in a {entry.type}")
    if entry.type == "IntxUnpackedToInt8Tensor":
        return INT_GROUPS[_bits(entry, info, header)]
    if entry.type == "Int8Tensor":
        return INT8 if whole_rows else INT_GROUPS[8]
    return FP8 if whole_rows and info.dtype is torch.float8_e4m3fn else FP8_GROUPS


def _bits(entry: Entry, info: TensorInfo, header: Header) -> int:
    written = str(entry.data.target_dtype.get("_data"))
    bits = int(written[3:]) if written[:3] == "int" and written[3:].isdecimal() else 0
    if bits not in INT_GROUPS:
        raise UnreadFormat(f"{header.path}: {info.name} has codes of {shown(written)}")
    if info.shape[1] * bits % 8:
        raise ShapeMismatch(
            f"{info.file}: {info.name} has {info.shape[1]} columns of {bits} bits, "
            "expected rows of whole bytes"
        )
    return bits


def _has_dynamic_input(entry: Entry, scheme: Scheme) -> bool:
    """Return whether inputs are quantized; the scheme does it per row, without zero points."""
    kwargs = entry.data.act_quant_kwargs
    if kwargs is None or scheme.quantize_activation is None:
        return False
    data = kwargs.get("_data")
    mapping = data.get("mapping_type", {}) if isinstance(data, Mapping) else {}
    return not isinstance(mapping, Mapping) or mapping.get("_data", SYMMETRIC) == SYMMETRIC


def _repack(
    tensors: Parts, scheme: Scheme, block: tuple[int, int], shape: tuple[int, int], where: str
) -> dict[str, Tensor]:
    """Return the parts of a weight from torchao's tensors."""
    codes, zero = tensors["qdata"], tensors.get("zero_point")
    count = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scale = tensors["scale"].reshape(count)
    bias = {"bias": tensors["bias"]} if "bias" in tensors else {}
    if "weight_scale" in scheme.parts:
        _check_no_zero(zero, where)
        return {"codes": codes, "weight_scale": scale.float().flatten()} | bias
    parts = {"codes": codes, "block_scale": scales_of_blocks(scale, block, shape)}
    if scheme is FP8_GROUPS:
        return parts | bias
    middle = 2 ** (scheme.bits - 1)
    parts["codes"] = pack_codes(_shifted(codes, middle, where), scheme.bits)
    if zero is not None:
        shifted = _shifted(zero.reshape(count), middle, f"{where} (zero points)")
        parts["zero_point"] = scales_of_blocks(shifted, block, shape)
    return parts | bias


def _shifted(codes: Tensor, middle: int, where: str) -> Tensor:
    """Return signed codes with `middle` added, uint8. Raises BrokenFile if one is out of range."""
    if not codes.is_meta and codes.numel():
        low, high = (int(end) for end in codes.aminmax())
        if low < -middle or high >= middle:
            raise BrokenFile(
                f"{where} has codes from {low} to {high}, expected {-middle} to {middle - 1}",
                "the file is damaged; export it again.",
            )
    return (codes.to(torch.int16) + middle).to(torch.uint8)


def _check_no_zero(zero: Tensor | None, where: str) -> None:
    if zero is not None and not zero.is_meta and bool(zero.any()):
        raise BadScale(
            f"{where} has zero points other than 0, and INT8 with a scale per row has none",
            "quantize the model with a symmetric mapping.",
        )
