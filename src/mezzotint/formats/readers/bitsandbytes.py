"""Read bitsandbytes' 4-bit weights (NF4, FP4) and LLM.int8(), as diffusers and Forge save them.

4 bits   X.weight [n/2, 1], two codes a byte, high nibble first, in uint8 or any storage dtype
         X.weight.quant_map f32 [16], the value of each code
         X.weight.absmax f32 [n/blocksize], one scale per block of the flattened matrix
         X.weight.quant_state.bitsandbytes__nf4 u8, JSON: shape, blocksize, quant_type, dtype
         Scales that are quantized again: X.weight.absmax u8, X.weight.nested_absmax f32,
         X.weight.nested_quant_map f32 [256], and nested_offset in the JSON
8 bits   X.weight i8 [out, in],  X.SCB f32 [out], largest magnitude of each row

Blocks run through the flattened matrix, so a block may cover parts of two rows. Each row then gets
one scale for each piece of a block: no value changes.
Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

import torch
from annotated_types import Len
from pydantic import ConfigDict, PositiveInt
from torch import Tensor

from mezzotint.containers import TensorInfo, read_all
from mezzotint.errors import BadScale, BrokenFile, MissingTensor, ShapeMismatch, UnreadFormat
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.formats.readers.mezzotint import quantization_config
from mezzotint.formats.repacked import RepackedLinear, stored
from mezzotint.layouts import swap_nibbles
from mezzotint.schemes import CODEBOOK4, LLM_INT8, Part, Parts, Shape
from mezzotint.schemes.scheme import FLOAT32, FLOAT_DTYPES
from mezzotint.tensor import PLAIN
from mezzotint.untrusted.escaping import shown
from mezzotint.untrusted.json import parse_object
from mezzotint.untrusted.schema import Entries, validated

METHODS = ("bitsandbytes", "bnb")
STATE = re.compile(r"(.+)\.weight\.quant_state\.bitsandbytes__(nf4|fp4)")
FOUR_BIT_SUFFIXES = (".weight.absmax", ".weight.quant_map")
SCB, WEIGHT_FORMAT = ".SCB", ".weight_format"
MAX_STATE, MAX_STATES = 64 * 2**10, 4 * 2**20
"""Bytes of one quantization state, and of all; a state has about 100."""
MAX_BLOCK = 4096
"""Largest block of bitsandbytes."""
DEFAULT_THRESHOLD = 6.0
"""Source: BitsAndBytesConfig.llm_int8_threshold of transformers and diffusers"""
MAX_DIFFERENCE = 1e-6
"""Files have the levels with seven digits or more."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
LEVELS = {"nf4": NF4, "fp4": (*FP4_MAGNITUDES, *(-level for level in FP4_MAGNITUDES))}
"""{quant_type: value of each code}; bitsandbytes decodes with these, whatever the file's table."""


class State(Entries):
    """The JSON of a 4-bit weight. Other entries are refused, as bitsandbytes refuses them."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    quant_type: Literal["nf4", "fp4"]
    blocksize: PositiveInt
    shape: Annotated[list[PositiveInt], Len(2, 2)]
    dtype: str
    nested_blocksize: PositiveInt | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float | None = None


class Bitsandbytes:
    name = "bitsandbytes"
    title = "bitsandbytes"

    def detect(self, header: Header) -> Match | NoMatch:
        declared = quantization_config(header).get("quant_method")
        layers = Counter(_kind(name) for name in header.tensors)
        found = [f"{layers[kind]} {kind} layers" for kind in KINDS if layers[kind]]
        if found:
            return Match(" and ".join(found), certain=True)
        marked = next((name for name in header.tensors if name.endswith(FOUR_BIT_SUFFIXES)), "")
        if marked:
            return Match(f"{marked} is there", certain=True)
        if declared in METHODS:
            return Match(f"config.json: quant_method {declared}", certain=True)
        return NoMatch("no layer has .weight.quant_state.bitsandbytes__nf4, ...__fp4 or .SCB")

    def contents(self, header: Header) -> Contents:
        linears = four_bit_linears(header) | int8_linears(header)
        if not linears:
            raise MissingTensor(
                f"{header.path}: config.json declares bitsandbytes, and no layer is quantized",
                "restore the config.json that came with these weights.",
            )
        ignored = _weight_formats(header, linears) | dict.fromkeys(
            (name for name in header.tensors if STATE.fullmatch(name)), STATE_REASON
        )
        return classify_tensors(header, linears, ignored)


FORMAT = Bitsandbytes()
STATE_REASON = "shape and block size of a weight"
KINDS = ("NF4", "FP4", "LLM.int8()")


def _kind(name: str) -> str:
    """Return the kind of the layer that a tensor marks, or an empty string."""
    state = STATE.fullmatch(name)
    return state[2].upper() if state else "LLM.int8()" if name.endswith(SCB) else ""


def four_bit_linears(header: Header) -> dict[str, StoredLinear]:
    """Return {module: linear} of the weights with a quantization state or a part of one."""
    infos = {m[1]: header.tensors[m[0]] for m in map(STATE.fullmatch, header.tensors) if m}
    modules = {
        name.removesuffix(suffix)
        for name in header.tensors
        for suffix in FOUR_BIT_SUFFIXES
        if name.endswith(suffix)
    }
    for module in sorted(modules - infos.keys()):
        raise MissingTensor(
            f"{header.path}: {module}.weight.quant_state.bitsandbytes__nf4 is not there, "
            f"and {module}.weight.absmax needs it (shape and block size of the weight)",
            "export or download the file again.",
        )
    states = _read_states(list(infos.values()))
    return {
        module: _four_bit_linear(header, module, state)
        for module, state in zip(infos, states, strict=True)
    }


def _read_states(infos: list[TensorInfo]) -> list[State]:
    """Return the quantization states, all small enough before one is read."""
    for info in infos:
        if info.dtype is not torch.uint8 or info.nbytes > MAX_STATE:
            raise BrokenFile(
                f"{info.file}: {info.name} is {info.dtype} of {info.nbytes:,} bytes, "
                f"expected JSON in uint8 of at most {MAX_STATE:,}"
            )
    if (total := sum(info.nbytes for info in infos)) > MAX_STATES:
        raise BrokenFile(
            f"{infos[0].file}: its quantization states have {total:,} bytes in total, "
            f"expected at most {MAX_STATES:,}"
        )
    return [
        _state(info, bytes(text.flatten().tolist()))
        for info, text in zip(infos, read_all(infos), strict=True)
    ]


def _state(info: TensorInfo, text: bytes) -> State:
    where = f"{info.file}: {info.name}"
    state = validated(State, parse_object(text, where, MAX_STATE), where)
    if not info.name.endswith(state.quant_type):
        raise BrokenFile(f"{where}: quant_type is {state.quant_type}, and its name says another")
    if state.blocksize > MAX_BLOCK or state.blocksize.bit_count() != 1:
        raise UnreadFormat(
            f"{where}: blocksize is {state.blocksize:,}, expected a power of two up to {MAX_BLOCK}"
        )
    if state.shape[1] % 2:
        raise ShapeMismatch(
            f"{where}: the weight has {state.shape[1]:,} input features, an odd number; "
            "two codes of a byte would belong to two rows",
            "use the BF16 model.",
        )
    return state


def _four_bit_linear(header: Header, module: str, state: State) -> StoredLinear:
    weight = f"{module}.weight"
    names = ["absmax", "quant_map"]
    nested = f"{weight}.nested_absmax" in header.tensors or state.nested_offset is not None
    names += ["nested_absmax", "nested_quant_map"] if nested else []
    rows, columns = state.shape
    keys = {"weight": weight} | {name: f"{weight}.{name}" for name in names}
    if f"{module}.bias" in header.tensors:
        keys["bias"] = f"{module}.bias"
    where = f"{header.path}: {weight}.quant_map"
    return RepackedLinear(
        module,
        CODEBOOK4,
        PLAIN,
        (rows, columns),
        keys,
        tensors=_four_bit_tensors(header.tensors.get(weight), state, nested),
        repack=partial(_repack, state=state, where=where),
    )


def _four_bit_tensors(weight: TensorInfo | None, state: State, nested: bool) -> dict[str, Part]:
    """Return {stored tensor: description} of a 4-bit weight."""
    numbers = math.prod(state.shape)
    blocks = -(-numbers // state.blocksize)
    dtype = torch.uint8 if weight is None else weight.storage_dtype
    # bitsandbytes stores the bytes in any dtype (bnb_4bit_quant_storage).
    packed = (numbers // 2 // dtype.itemsize, 1)
    tensors = {
        "weight": stored((dtype,), (packed,), "two codes a byte"),
        "quant_map": stored(FLOAT32, ((16,),), "value of each code"),
    }
    if not nested:
        absmax = stored(FLOAT_DTYPES, ((blocks,),), "scale of each block", scale=True, signed=True)
        return tensors | {"absmax": absmax}
    outer = -(-blocks // (state.nested_blocksize or 1))
    return tensors | {
        "absmax": stored((torch.uint8,), ((blocks,),), "quantized scale of each block"),
        "nested_absmax": stored(
            FLOAT_DTYPES, ((outer,),), "scale of the scales of blocks", scale=True, signed=True
        ),
        "nested_quant_map": stored(FLOAT32, ((256,),), "value of each quantized scale"),
    }


def _repack(tensors: Parts, state: State, where: str) -> dict[str, Tensor]:
    """Return the parts of a 4-bit weight from bitsandbytes' tensors."""
    rows, columns = state.shape
    codes = tensors["weight"].reshape(-1).view(torch.uint8).view(rows, columns // 2)
    _check_levels(tensors["quant_map"], state.quant_type, where)
    parts = {
        "codes": swap_nibbles(codes),
        "block_scale": scales_by_row(_absmax(tensors, state), state.blocksize, (rows, columns)),
        "codebook": tensors["quant_map"],
    }
    return parts | ({"bias": tensors["bias"]} if "bias" in tensors else {})


def _check_levels(table: Tensor, quant_type: str, where: str) -> None:
    """Raise BadScale if the table is not the one that bitsandbytes decodes with."""
    if table.is_meta:
        return
    levels = torch.tensor(LEVELS[quant_type])
    if not torch.allclose(table, levels, rtol=0, atol=MAX_DIFFERENCE):
        raise BadScale(
            f"{where} holds {shown(table.tolist())}, expected the levels of {quant_type}",
            "bitsandbytes ignores this table; the file is damaged, or of another tool.",
        )


def _absmax(tensors: Parts, state: State) -> Tensor:
    """Return the scale of each block, float32 [blocks], decoded if it is quantized."""
    absmax = tensors["absmax"]
    if "nested_absmax" not in tensors:
        return absmax.float()
    block = torch.arange(len(absmax), device=absmax.device) // (state.nested_blocksize or 1)
    outer = tensors["nested_absmax"].float()[block]
    return tensors["nested_quant_map"][absmax.int()] * outer + (state.nested_offset or 0.0)


def scales_by_row(scales: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    """Return the scales of blocks of the flattened matrix, as [out, in/group].

    The group is the largest one that lies within one block and one row, wherever it begins.

    scales   [ceil(out * in / block)]
    """
    rows, columns = shape
    group = math.gcd(block, columns)
    first = torch.arange(0, rows * columns, group, device=scales.device)
    return scales[first // block].view(rows, columns // group)


def int8_linears(header: Header) -> dict[str, StoredLinear]:
    """Return {module: linear} of LLM.int8(); without any SCB, no INT8 weight is meant."""
    if not any(name.endswith(SCB) for name in header.tensors):
        return {}
    infos = header.tensors.values()
    named = {info.name.removesuffix(SCB) for info in infos if info.name.endswith(SCB)}
    named |= {
        info.name.removesuffix(".weight")
        for info in infos
        if info.name.endswith(".weight") and info.dtype is torch.int8
    }
    threshold = _threshold(header)
    return {module: _int8_linear(header, module, threshold) for module in sorted(named)}


def _int8_linear(header: Header, module: str, threshold: float) -> StoredLinear:
    keys = {"codes": f"{module}.weight", "row_amax": module + SCB}
    if f"{module}.bias" in header.tensors:
        keys["bias"] = f"{module}.bias"
    weight = header.tensors.get(keys["codes"])
    shape: Shape = () if weight is None else weight.shape
    rows, columns = (*shape, 0, 0)[:2]
    implied = {"outlier_threshold": threshold} if threshold else {}
    return StoredLinear(module, LLM_INT8, PLAIN, (rows, columns), keys, implied)


def _threshold(header: Header) -> float:
    """Return the magnitude from which inputs stay unquantized, 0 for none."""
    value = quantization_config(header).get("llm_int8_threshold", DEFAULT_THRESHOLD)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise BrokenFile(f"{header.path}: llm_int8_threshold is {shown(value)}, expected a number")
    return float(value)


def _weight_formats(header: Header, linears: Mapping[str, StoredLinear]) -> dict[str, str]:
    """Return {marker of a weight's byte order: reason}; only 0, row-major, is read."""
    infos = [
        header.tensors[module + WEIGHT_FORMAT]
        for module, linear in linears.items()
        if linear.scheme is LLM_INT8 and module + WEIGHT_FORMAT in header.tensors
    ]
    for info in infos:
        if info.shape not in ((), (1,)):
            raise ShapeMismatch(f"{info.file}: {info.name} has shape {list(info.shape)}")
    for info, value in zip(infos, read_all(infos), strict=True):
        if value.item() != 0:
            raise UnreadFormat(
                f"{info.file}: {info.name} is {value.item()}, expected 0 (row-major)",
                "save the model again with bitsandbytes 0.45 or newer.",
            )
    return {info.name: "marker of the weight's byte order" for info in infos}
