"""Read integers in 32-bit words: AutoRound, GPTQ and AWQ, which diffusers reads through AutoRound.

GPTQ   X.qweight i32 [in * bits / 32, out],  X.qzeros i32 [in/group, out * bits / 32],
       X.scales f16 [in/group, out],  maybe X.g_idx i32 [in], the group of each input feature
AWQ    X.qweight i32 [in, out * bits / 32],  X.qzeros and X.scales as above

The bits of the words are a stream of codes, lowest first; AWQ exchanges codes within eight.
A weight is (code - zero) * scale. GPTQ's first format stores zero - 1. The shapes show the packing
and the bits; config.json states which zeros are stored.
Sources: https://github.com/intel/auto-round (utils/bit_packing.py),
https://github.com/ModelCloud/GPTQModel (checkpoint_format)
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mezzotint.containers import TensorInfo
from mezzotint.errors import BrokenFile, MissingTensor, ShapeMismatch, UnreadFormat
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.formats.readers.mezzotint import quantization_config
from mezzotint.formats.repacked import RepackedLinear, stored
from mezzotint.schemes import INT_GROUPS, Part, Parts
from mezzotint.schemes.int_groups import pack_codes, unpack_codes
from mezzotint.schemes.scheme import FLOAT_DTYPES
from mezzotint.tensor import PLAIN
from mezzotint.untrusted.escaping import shown
from mezzotint.untrusted.schema import Entries, validated

AUTOROUND, GPTQ, AWQ = ("auto-round", "autoround", "intel/auto-round"), "gptq", "awq"
METHODS = (*AUTOROUND, GPTQ, AWQ)
WEIGHT, ZEROS, SCALES, INDEX = ".qweight", ".qzeros", ".scales", ".g_idx"
WORD = 32
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ stores each of eight codes."""


class Declared(Entries):
    """The entries of quantization_config that decide what the tensors mean.

    packing_format      AutoRound: auto_round:auto_gptq, auto_round:auto_awq, auto_round, ...
    checkpoint_format   GPTQ: gptq, whose zeros are one less, or gptq_v2
    version             AWQ: gemm, or the order of another kernel
    """

    sym: bool | None = None
    packing_format: str = "auto_round:auto_gptq"
    checkpoint_format: str = "gptq"
    version: str = "gemm"
    data_type: str = "int"
    act_bits: int | None = None


@dataclass(frozen=True)
class Form:
    """How the codes of a layer are stored.

    zero_offset    what to add to the stored zeros
    is_symmetric   config.json says that a weight of 0 has the middle code
    """

    shape: tuple[int, int]
    groups: int
    bits: int
    is_awq: bool
    zero_offset: int
    is_symmetric: bool


class GPTQAndAWQ:
    name = "gptq_awq"
    title = "AutoRound, GPTQ or AWQ"

    def detect(self, header: Header) -> Match | NoMatch:
        method = quantization_config(header).get("quant_method")
        if isinstance(method, str) and method.lower() in METHODS:
            return Match(f"config.json: quant_method {method.lower()}", certain=True)
        return NoMatch("config.json has no quant_method auto-round, gptq or awq")

    def contents(self, header: Header) -> Contents:
        where = f"{header.path}: quantization_config of config.json"
        declared = validated(Declared, quantization_config(header), where)
        offset = _zero_offset(header, declared, where)
        modules = [name.removesuffix(WEIGHT) for name in header.tensors if name.endswith(WEIGHT)]
        if not modules:
            raise MissingTensor(
                f"{header.path}: config.json declares integers in words, and no layer is quantized",
                "restore the config.json that came with these weights.",
            )
        linears = {module: _linear(header, module, declared, offset) for module in modules}
        counts = Counter(linear.scheme.title for linear in linears.values())
        said = ", ".join(f"{count} layers {title}" for title, count in counts.items())
        found = classify_tensors(header, linears, {})
        return Contents(found.linears, found.plain, found.ignored, evidence=(said,))


FORMAT = GPTQAndAWQ()


def _zero_offset(header: Header, declared: Declared, where: str) -> int:
    """Return what to add to stored zeros. Raises UnreadFormat for another kind of weights."""
    method = str(quantization_config(header).get("quant_method")).lower()
    if declared.data_type != "int" or (declared.act_bits or 16) < 16:
        raise UnreadFormat(
            f"{where} has data_type {shown(declared.data_type)} and act_bits {declared.act_bits}; "
            "only integer weights with unquantized inputs are read"
        )
    if method == AWQ:
        return _declared_offset({"gemm": 0}, "version", declared.version.lower(), where)
    if method == GPTQ:
        formats = {"gptq": 1, "gptq_v2": 0}
        return _declared_offset(formats, "checkpoint_format", declared.checkpoint_format, where)
    packing = declared.packing_format
    return 1 if "gptq" in packing and "gptqmodel" not in packing else 0


def _declared_offset(known: Mapping[str, int], entry: str, value: str, where: str) -> int:
    if value not in known:
        raise UnreadFormat(f"{where} has {entry} {shown(value)}, expected {' or '.join(known)}")
    return known[value]


def _linear(header: Header, module: str, declared: Declared, offset: int) -> StoredLinear:
    keys = {"weight": module + WEIGHT, "zeros": module + ZEROS, "scales": module + SCALES}
    for key in keys.values():
        if key not in header.tensors:
            raise MissingTensor(
                f"{header.path}: {key} is not there, and {keys['weight']} needs it",
                "a missing scale is never taken to be 1.0; export or download the file again.",
            )
    form = _form({name: header.tensors[key] for name, key in keys.items()}, declared, offset)
    rows, columns = form.shape
    groups, bits = form.groups, form.bits
    words = rows * bits // WORD
    packed = (columns, words) if form.is_awq else (columns * bits // WORD, rows)
    tensors: dict[str, Part] = {
        "weight": stored((torch.int32,), (packed,), "packed codes"),
        "zeros": stored((torch.int32,), ((groups, words),), "packed zero points"),
        "scales": stored(FLOAT_DTYPES, ((groups, rows),), "scale of each group", scale=True),
        "index": stored((torch.int32, torch.int64), ((columns,),), "group of each column"),
    }
    optional = {"index": module + INDEX, "bias": f"{module}.bias"}
    keys |= {name: key for name, key in optional.items() if key in header.tensors}
    repack = partial(_repack, form=form, where=f"{header.path}: {module}")
    return RepackedLinear(
        module, INT_GROUPS[bits], PLAIN, form.shape, keys, tensors=tensors, repack=repack
    )


def _form(infos: Mapping[str, TensorInfo], declared: Declared, offset: int) -> Form:
    """Return how a layer's codes are stored, by the shapes of its tensors. Raises ShapeMismatch."""
    weight, zeros, scales = infos["weight"], infos["zeros"], infos["scales"]
    sizes = (*weight.shape, *zeros.shape, *scales.shape)
    if len(sizes) == 6 and 0 not in sizes and len(weight.shape) == len(zeros.shape) == 2:
        rows, groups = scales.shape[1], scales.shape[0]
        bits = zeros.shape[1] * WORD // rows
        is_awq = weight.shape[1] == zeros.shape[1] and weight.shape[1] != rows
        columns = weight.shape[0] if is_awq else weight.shape[0] * WORD // max(bits, 1)
        # Rows of codes must be whole words along the packed side, and whole bytes in memory.
        whole = rows * bits % WORD == 0 and columns * bits % (8 if is_awq else WORD) == 0
        if bits in INT_GROUPS and columns % groups == 0 and whole:
            offset = 0 if is_awq else offset
            return Form((rows, columns), groups, bits, is_awq, offset, bool(declared.sym))
    raise ShapeMismatch(
        f"{weight.file}: {weight.name} has shape {list(weight.shape)}, which zeros of "
        f"{list(zeros.shape)} and scales of {list(scales.shape)} do not fit",
        "restore the config.json that came with these weights.",
    )


def _repack(tensors: Parts, form: Form, where: str) -> dict[str, Tensor]:
    """Return the parts of a weight from the tool's tensors."""
    if "index" in tensors:
        _check_order(tensors["index"], form.shape[1] // form.groups, where)
    parts = {
        "codes": _codes(tensors["weight"], form),
        "block_scale": tensors["scales"].t().contiguous(),
        "zero_point": _zeros(tensors["zeros"], form, where).t().contiguous(),
    }
    return parts | ({"bias": tensors["bias"]} if "bias" in tensors else {})


def _codes(words: Tensor, form: Form) -> Tensor:
    """Return codes as the schemes have them: rows of bits."""
    if not form.is_awq:
        # A column of words is a row of bits already.
        return words.t().clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return pack_codes(_unpacked(words, form).t().contiguous(), form.bits)


def _unpacked(words: Tensor, form: Form) -> Tensor:
    """Return the codes of rows of words, in the model's order: uint8 [rows, columns]."""
    codes = unpack_codes(words.contiguous().view(torch.uint8), form.bits)
    if not form.is_awq:
        return codes
    eights = codes.reshape(len(codes), -1, len(PLACES))
    return eights[..., list(PLACES)].flatten(1)


def _zeros(words: Tensor, form: Form, where: str) -> Tensor:
    """Return the zero points, uint8 [groups, out]. Raises BrokenFile if they contradict."""
    zeros = _unpacked(words, form).to(torch.int16) + form.zero_offset
    if not zeros.is_meta:
        low, high = (int(end) for end in zeros.aminmax())
        middle = 2 ** (form.bits - 1)
        if form.is_symmetric and (low, high) != (middle, middle):
            raise BrokenFile(
                f"{where}{ZEROS} has zeros from {low} to {high}, and config.json says that the "
                f"codes are symmetric, so that they are {middle}",
                "restore the config.json that came with these weights.",
            )
        if high > torch.iinfo(torch.uint8).max:
            raise BrokenFile(f"{where}{ZEROS} has a zero of {high}, which is no code")
    return zeros.to(torch.uint8)


def _check_order(index: Tensor, group: int, where: str) -> None:
    """Raise UnreadFormat unless the groups of columns are in order."""
    if index.is_meta or torch.equal(index, torch.arange(len(index)).to(index.dtype) // group):
        return
    raise UnreadFormat(
        f"{where}{INDEX} reorders the columns of the weight (GPTQ with activation ordering), "
        "which is not read",
        "quantize the model with desc_act false.",
    )
