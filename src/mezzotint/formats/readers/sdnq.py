"""Read SDNQ: integers of 2 to 8 bits or FP8, with groups, a low-rank branch, or a rotation.

X.weight       codes: i8, u8 or e4m3 [out, in] or [out, groups, group]; or packed bytes
X.scale        float [out, 1] or [out, groups, 1]
X.zero_point   likewise, added after the scale, of unsigned codes
X.svd_up       [out, rank],  X.svd_down [rank, in]

With `use_quantized_matmul`, matrices and low-rank factors may be stored transposed. config.json
states the dtype of the codes, and whether columns are rotated by a Hadamard matrix.
Source: https://github.com/Disty0/sdnq (dequantizer.py, packed_int/, quant_utils.py)
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from mezzotint.containers import TensorInfo
from mezzotint.errors import MissingTensor, ShapeMismatch, UnreadFormat
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.formats.readers.mezzotint import quantization_config
from mezzotint.formats.repacked import RepackedLinear, stored
from mezzotint.schemes import FP8, FP8_GROUPS, INT8, INT_GROUPS, Part, Parts, Scheme, Shape
from mezzotint.schemes.int_groups import pack_codes
from mezzotint.schemes.rotation import regular_hadamard, sylvester_hadamard
from mezzotint.schemes.scheme import FLOAT_DTYPES
from mezzotint.tensor import PLAIN
from mezzotint.untrusted.escaping import shown
from mezzotint.untrusted.schema import Entries, validated

METHOD = "sdnq"
E4M3 = torch.float8_e4m3fn
BYTES = (torch.uint8, torch.int8, E4M3)
AGAIN = "quantize the model without that option, or use the BF16 model."
UNREAD = (".scale_2", ".scale_zero_point", ".zero_point_scale", ".zero_point_2")
"""Endings of tensors of scales that are quantized again."""
DTYPE = re.compile(r"(minimum[-_]?)?(u?)(?:int)?([2-8])[-_]?(bits?)?")
"""A dtype of integers, or a least number of bits: int5, uint4, minimum_6bit."""
LARGEST_UNSIGNED = 4
"""Bits up to which a least number of bits stands for an unsigned dtype."""
MIN_ROTATION = 4
Pick = tuple[int, int, int, int]
PACKED: Mapping[int, tuple[int, tuple[tuple[Pick, ...], ...]]] = {
    3: (
        3,
        (
            *(((byte, 0, 7, 0),) for byte in range(3)),
            *(((byte, 3, 7, 0),) for byte in range(3)),
            ((0, 6, 3, 0), (2, 6, 1, 2)),
            ((1, 6, 3, 0), (2, 7, 1, 2)),
        ),
    ),
    5: (
        5,
        (
            *(((byte, 0, 31, 0),) for byte in range(5)),
            ((0, 5, 7, 0), (3, 5, 3, 3)),
            ((1, 5, 7, 0), (4, 5, 3, 3)),
            ((2, 5, 7, 0), (4, 7, 1, 3), (3, 7, 1, 4)),
        ),
    ),
    6: (
        3,
        (
            *(((byte, 0, 63, 0),) for byte in range(3)),
            ((0, 6, 3, 4), (1, 6, 3, 2), (2, 6, 3, 0)),
        ),
    ),
    7: (
        7,
        (
            *(((byte, 0, 127, 0),) for byte in range(7)),
            tuple((byte, 7, 1, 6 - byte) for byte in range(7)),
        ),
    ),
}
"""{bits: (bytes, for each code the picks that make it)}; a pick is (byte, right shift, mask, left
shift). Codes of 2 and 4 bits lie in a byte one after another, lowest first."""


class Declared(Entries):
    """The entries of quantization_config that decide what the tensors mean."""

    weights_dtype: str = "int8"
    modules_dtype_dict: dict[str, Any] | None = None
    modules_quant_config: dict[str, Any] | None = None
    use_hadamard: bool = False
    hadamard_group_size: PositiveInt = Field(default=256, le=4096)
    use_codebook: bool = False
    use_quantized_matmul: bool = False


@dataclass(frozen=True)
class Form:
    """How the codes of a layer are stored.

    transposed   the matrix is [in, out]
    """

    shape: tuple[int, int]
    groups: int
    bits: int
    transposed: bool = False


class SDNQ:
    name = "sdnq"
    title = "SDNQ"

    def detect(self, header: Header) -> Match | NoMatch:
        if quantization_config(header).get("quant_method") == METHOD:
            return Match(f"config.json: quant_method {METHOD}", certain=True)
        return NoMatch(f"config.json has no quantization_config with quant_method {METHOD}")

    def contents(self, header: Header) -> Contents:
        where = f"{header.path}: quantization_config of config.json"
        declared = validated(Declared, quantization_config(header), where)
        _refuse_unread(header, declared, where)
        modules = [
            name.removesuffix(".scale")
            for name in header.tensors
            if name.endswith(".scale") and _is_quantized(header, name.removesuffix(".scale"))
        ]
        modules += _without_scale(header, set(modules))
        if not modules:
            raise MissingTensor(
                f"{header.path}: config.json declares {METHOD}, and no layer is quantized",
                "restore the config.json that came with these weights.",
            )
        linears = {module: _linear(header, module, declared) for module in modules}
        counts = Counter(linear.scheme.title for linear in linears.values())
        said = ", ".join(f"{count} layers {title}" for title, count in counts.items())
        rotated = f"; columns rotated in groups of {declared.hadamard_group_size}"
        said += rotated if declared.use_hadamard else ""
        found = classify_tensors(header, linears, {})
        return Contents(found.linears, found.plain, found.ignored, evidence=(said,))


FORMAT = SDNQ()


def _refuse_unread(header: Header, declared: Declared, where: str) -> None:
    if declared.use_codebook:
        raise UnreadFormat(f"{where} has use_codebook, which is not read", AGAIN)
    if declared.modules_quant_config:
        raise UnreadFormat(
            f"{where} has modules_quant_config {shown(declared.modules_quant_config)}: "
            "another way to quantize some layers, which is not read",
            AGAIN,
        )
    again = next((name for name in header.tensors if name.endswith(UNREAD)), None)
    if again is not None:
        raise UnreadFormat(
            f"{header.path}: {again} quantizes scales again, which is not read", AGAIN
        )


def _is_quantized(header: Header, module: str) -> bool:
    weight = header.tensors.get(f"{module}.weight")
    return weight is None or weight.dtype not in FLOAT_DTYPES


def _without_scale(header: Header, modules: set[str]) -> list[str]:
    """Return the layers whose codes lost their scale."""
    return [
        name.removesuffix(".weight")
        for name, info in header.tensors.items()
        if name.endswith(".weight")
        and info.dtype in BYTES
        and name.removesuffix(".weight") not in modules
    ]


def _linear(header: Header, module: str, declared: Declared) -> StoredLinear:
    keys = {"weight": f"{module}.weight", "scale": f"{module}.scale"}
    for name, key in keys.items():
        if key not in header.tensors:
            other = keys["scale" if name == "weight" else "weight"]
            raise MissingTensor(
                f"{header.path}: {key} is not there, and {other} needs it",
                "a missing scale is never taken to be 1.0; export or download the file again.",
            )
    weight, scale = header.tensors[keys["weight"]], header.tensors[keys["scale"]]
    form = _form(header, module, weight, scale, declared)
    names = {"zero": "zero_point", "up": "svd_up", "down": "svd_down"}
    keys |= {
        role: f"{module}.{name}"
        for role, name in names.items()
        if f"{module}.{name}" in header.tensors
    }
    if weight.dtype is torch.uint8 and (form.bits, True) not in _stated(declared):
        keys["zero"] = f"{module}.zero_point"
    for role, other in (("up", "down"), ("down", "up")):
        if role in keys:
            keys[other] = f"{module}.{names[other]}"
    if f"{module}.bias" in header.tensors:
        keys["bias"] = f"{module}.bias"
    scheme = _scheme(weight, form, "zero" in keys)
    return RepackedLinear(
        module,
        scheme,
        PLAIN,
        form.shape,
        keys,
        implied_values=_rotation(form.shape[1], declared),
        dynamic_input=declared.use_quantized_matmul and scheme.quantize_activation is not None,
        tensors=_tensors(header, keys, form),
        repack=partial(_repack, form=form, scheme=scheme),
    )


def _scheme(weight: TensorInfo, form: Form, has_zero: bool) -> Scheme:
    if weight.dtype is E4M3:
        return FP8 if form.groups == 1 else FP8_GROUPS
    if weight.dtype is torch.int8 and form.groups == 1 and not has_zero:
        return INT8
    return INT_GROUPS[form.bits]


def _form(
    header: Header, module: str, weight: TensorInfo, scale: TensorInfo, declared: Declared
) -> Form:
    """Return how the codes are stored, by the shapes of weight and scale."""
    shape, scales = weight.shape, scale.shape
    if _is_packed(weight) and len(scales) in (2, 3) and scales[-1] == 1 and scales[0]:
        return _packed_form(header, module, weight, scales, declared)
    if weight.dtype in BYTES and not _is_packed(weight):
        if len(shape) == 2 and scales == (1, shape[1]) and shape[0] and shape[1] > 1:
            return Form((shape[1], shape[0]), 1, 8, transposed=True)
        if len(shape) in (2, 3) and 0 not in shape and scales == (*shape[:-1], 1):
            groups = shape[1] if len(shape) == 3 else 1
            return Form((shape[0], shape[-1] * groups), groups, 8)
    raise ShapeMismatch(
        f"{weight.file}: {weight.name} is {weight.dtype} {list(shape)}, "
        f"which a scale of {list(scales)} does not fit (SDNQ)",
        "export or download the file again.",
    )


def _is_packed(weight: TensorInfo) -> bool:
    """Return whether codes of fewer than 8 bits are packed; no layer has so few columns."""
    columns = weight.shape[1:] if len(weight.shape) < 3 else (0,)
    return weight.dtype is torch.uint8 and columns in (
        (),
        *((size,) for size, _ in PACKED.values()),
    )


def _stated(declared: Declared) -> list[tuple[int, bool]]:
    """Return (bits, whether they are signed) of the declared integer dtypes, the default first."""
    names = [declared.weights_dtype, *(declared.modules_dtype_dict or {})]
    found = [match for name in names if (match := DTYPE.fullmatch(name.lower()))]
    stated = []
    for match in found:
        least, unsigned, bits = match[1] or match[4], bool(match[2]), int(match[3])
        unsigned = unsigned or bool(least and bits <= LARGEST_UNSIGNED)
        stated.append((bits, not unsigned))
    return stated


def _packed_form(
    header: Header, module: str, weight: TensorInfo, scales: Shape, declared: Declared
) -> Form:
    """Return the form of packed codes: the declared number of bits that gives the bytes."""
    down = header.tensors.get(f"{module}.svd_down")
    sides = () if down is None else down.shape
    groups = scales[1] if len(scales) == 3 else 1
    for bits in dict.fromkeys(bits for bits, _ in _stated(declared) if bits < 8):
        codes = weight.nbytes * 8 // bits
        columns = codes // scales[0]
        whole = columns > 0 and codes == columns * scales[0] and columns % groups == 0
        # The low-rank branch shows the columns; else the declared dtype comes first.
        if whole and _has_packed_shape(weight.shape, bits) and (not sides or columns in sides):
            return _checked(Form((scales[0], columns), groups, bits), weight)
    raise ShapeMismatch(
        f"{weight.file}: {weight.name} has shape {list(weight.shape)}, which no declared dtype "
        f"gives with a scale of {list(scales)} (SDNQ)",
        "restore the config.json that came with these weights.",
    )


def _has_packed_shape(shape: Shape, bits: int) -> bool:
    if bits in PACKED:
        return len(shape) == 2 and shape[1] == PACKED[bits][0]
    return len(shape) == 1


def _checked(form: Form, weight: TensorInfo) -> Form:
    """Raise ShapeMismatch if the codes of a row are no whole bytes."""
    if form.shape[1] * form.bits % 8:
        raise ShapeMismatch(
            f"{weight.file}: {weight.name} has {form.shape[1]} columns of {form.bits} bits, "
            "expected rows of whole bytes",
            "use the BF16 model.",
        )
    return form


def _tensors(header: Header, keys: Mapping[str, str], form: Form) -> dict[str, Part]:
    """Return {stored tensor: description}; `_form` has checked weight and scale together."""
    rows, columns = form.shape
    weight, scale = header.tensors[keys["weight"]], header.tensors[keys["scale"]]
    down = header.tensors.get(keys.get("down", ""))
    rank = next((n for n in (() if down is None else down.shape) if n != columns), columns)
    return {
        "weight": stored((weight.storage_dtype,), (weight.shape,), "codes"),
        "scale": stored(FLOAT_DTYPES, (scale.shape,), "scale of each group", True, True),
        "zero": stored(FLOAT_DTYPES, (scale.shape,), "offset of each group", True, True),
        "up": stored(FLOAT_DTYPES, ((rows, rank), (rank, rows)), "low-rank branch, up"),
        "down": stored(FLOAT_DTYPES, ((rank, columns), (columns, rank)), "low-rank branch, down"),
    }


def _rotation(columns: int, declared: Declared) -> dict[str, float | Tensor]:
    """Return the Hadamard matrix of a layer: the largest power of two that divides its columns."""
    if not declared.use_hadamard:
        return {}
    size = 1 << (min(columns, declared.hadamard_group_size) - 1).bit_length()
    while columns % size:
        size //= 2
    if size < MIN_ROTATION:
        return {}
    is_power_of_four = size.bit_length() % 2 == 1
    return {"rotation": regular_hadamard(size) if is_power_of_four else sylvester_hadamard(size)}


def _repack(tensors: Parts, form: Form, scheme: Scheme) -> dict[str, Tensor]:
    """Return the parts of a weight from SDNQ's tensors."""
    rows, columns = form.shape
    codes, scale = tensors["weight"], tensors["scale"].reshape(rows, form.groups)
    codes = codes.t().contiguous() if form.transposed else codes
    parts: dict[str, Tensor] = {"bias": tensors["bias"]} if "bias" in tensors else {}
    if "up" in tensors:
        up, down = tensors["up"], tensors["down"]
        parts["lora_up"] = up if up.shape[0] == rows else up.t().contiguous()
        parts["lora_down"] = down if down.shape[1] == columns else down.t().contiguous()
    if "weight_scale" in scheme.parts:
        codes = codes.reshape(rows, columns)
        return parts | {"codes": codes, "weight_scale": scale.float().flatten()}
    parts["block_scale"] = scale
    if "zero" in tensors:
        parts["block_zero"] = tensors["zero"].reshape(rows, form.groups)
    return parts | {"codes": _codes(codes, form)}


def _codes(codes: Tensor, form: Form) -> Tensor:
    """Return codes as the schemes have them: unsigned, rows of bits."""
    rows, columns = form.shape
    if codes.dtype is torch.int8:
        codes = codes.view(torch.uint8) ^ 0x80  # adds 128, modulo 256
    if form.bits in PACKED:
        codes = pack_codes(unpack_sdnq(codes, form.bits).reshape(rows, columns), form.bits)
    return codes.reshape(rows, columns * form.bits // 8)


def unpack_sdnq(packed: Tensor, bits: int) -> Tensor:
    """Return the codes of 3, 5, 6 or 7 bits: uint8 [n, bytes] to uint8 [n, codes]."""
    codes = []
    for picks in PACKED[bits][1]:
        code = torch.zeros_like(packed[:, 0])
        for byte, right, mask, left in picks:
            code = code | (packed[:, byte] >> right & mask) << left
        codes.append(code)
    return torch.stack(codes, dim=1)
