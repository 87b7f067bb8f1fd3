"""Read optimum-quanto's tensors, as diffusers, optimum and mmgp (WanGP) save them.

qint8, qfloat8   X.weight._data i8, e4m3 or e5m2 [out, in],  X.weight._scale [out, 1]
qint4, qint2     X.weight._data._data u8, the rows of groups [out * in/group, group] packed:
                 byte r has the codes of rows r, r + n, ..., lowest bits first, n rows of bytes
                 X.weight._scale and X.weight._shift [out * in/group, 1]
all              X.input_scale and X.output_scale [], 1.0 unless inputs and outputs are quantized

A float shift is subtracted after the scale, an integer one before. The tensors of grouped weights
do not show the shape of the matrix: the bias does, or the model of config.json.
Source: https://github.com/huggingface/optimum-quanto/tree/main/optimum/quanto/tensor
"""

from collections import Counter
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from mezzotint.containers import DType, TensorInfo, read_all
from mezzotint.errors import BrokenFile, MissingTensor, ShapeMismatch, UnreadFormat
from mezzotint.families.building import outline_model
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.formats.readers.mezzotint import quantization_config
from mezzotint.formats.repacked import RepackedLinear, stored
from mezzotint.schemes import FP8, FP8_E5M2, INT8, INT_GROUPS, INT_SHIFTED, Part, Parts, Scheme
from mezzotint.schemes.int_groups import pack_codes
from mezzotint.schemes.scheme import FLOAT_DTYPES
from mezzotint.tensor import PLAIN

METHODS = ("quanto", "optimum-quanto")
DATA, PACKED, SCALE, SHIFT = (
    *(".weight._data", ".weight._data._data"),
    *(".weight._scale", ".weight._shift"),
)
ACTIVATIONS = (".input_scale", ".output_scale")
SCHEME_OF_DTYPE: dict[DType, Scheme] = {
    torch.int8: INT8,
    torch.float8_e4m3fn: FP8,
    torch.float8_e5m2: FP8_E5M2,
}
INTEGERS = (torch.int8, torch.uint8)
UNUSED = "a scale of 1.0: inputs and outputs are not quantized"


class Quanto:
    name = "quanto"
    title = "optimum-quanto"

    def detect(self, header: Header) -> Match | NoMatch:
        method = quantization_config(header).get("quant_method")
        if method in METHODS:
            return Match(f"config.json: quant_method {method}", certain=True)
        found = next((name for name in header.tensors if name.endswith((DATA, PACKED))), None)
        if found is not None:
            return Match(f"{found} is there", certain=True)
        return NoMatch(f"no tensor ends in {DATA}, and config.json has no quant_method quanto")

    def contents(self, header: Header) -> Contents:
        whole = _modules(header, DATA)
        packed = _modules(header, PACKED)
        if not whole and not packed:
            raise MissingTensor(
                f"{header.path}: config.json declares quanto, and no layer is quantized",
                "restore the config.json that came with these weights.",
            )
        linears: dict[str, StoredLinear] = {m: _whole(header, m) for m in whole}
        linears |= {module: _packed(header, module) for module in packed}
        counts = Counter(linear.scheme.title for linear in linears.values())
        said = ", ".join(f"{count} layers {title}" for title, count in counts.items())
        found = classify_tensors(header, linears, _unused_scales(header))
        return Contents(found.linears, found.plain, found.ignored, evidence=(said,))


FORMAT = Quanto()


def _modules(header: Header, suffix: str) -> list[str]:
    return [n.removesuffix(suffix) for n in header.tensors if n.endswith(suffix)]


def _unused_scales(header: Header) -> dict[str, str]:
    """Return {scale of an input or output: reason}. Raises UnreadFormat if one is used."""
    infos = [info for name, info in header.tensors.items() if name.endswith(ACTIVATIONS)]
    for info in infos:
        if info.shape not in ((), (1,)):
            raise ShapeMismatch(f"{info.file}: {info.name} has shape {list(info.shape)}")
    for info, value in zip(infos, read_all(infos), strict=True):
        if value.item() != 1:
            raise UnreadFormat(
                f"{info.file}: {info.name} is {value.item():g}: the outputs of layers are "
                "quantized, which is not supported",
                "quantize the weights alone (activations=None).",
            )
    return {info.name: UNUSED for info in infos}


def _keys(header: Header, module: str, **keys: str) -> dict[str, str]:
    found = {part: module + suffix for part, suffix in keys.items()}
    return found | ({"bias": f"{module}.bias"} if f"{module}.bias" in header.tensors else {})


def _whole(header: Header, module: str) -> StoredLinear:
    """Return a layer of 8-bit codes."""
    info = header.tensors[module + DATA]
    scheme = SCHEME_OF_DTYPE.get(info.dtype)
    if scheme is None:
        raise UnreadFormat(
            f"{info.file}: {info.name} is {info.dtype}, expected "
            f"{' or '.join(map(str, SCHEME_OF_DTYPE))}"
        )
    rows, columns = (*info.shape, 0, 0)[:2]
    keys = _keys(header, module, codes=DATA, weight_scale=SCALE)
    return StoredLinear(module, scheme, PLAIN, (rows, columns), keys)


def _packed(header: Header, module: str) -> StoredLinear:
    """Return a layer of 2-bit or 4-bit codes in groups."""
    keys = _keys(header, module, packed=PACKED, scale=SCALE, shift=SHIFT)
    for name in ("scale", "shift"):
        if keys[name] not in header.tensors:
            raise MissingTensor(
                f"{header.path}: {keys[name]} is not there, and {keys['packed']} needs it",
                "a missing scale is never taken to be 1.0; export or download the file again.",
            )
    info, scale, shift = (header.tensors[keys[name]] for name in ("packed", "scale", "shift"))
    bits = _bits(info, scale)
    groups, size = scale.shape[0], info.shape[1]
    shape = _shape(header, module, groups, size, bits)
    is_float = shift.dtype in FLOAT_DTYPES
    tensors: dict[str, Part] = {
        "packed": stored((torch.uint8,), ((-(-groups * bits // 8), size),), "packed codes"),
        "scale": stored(FLOAT_DTYPES, ((groups, 1),), "scale of each group", scale=True),
        "shift": stored(
            (scale.storage_dtype,) if is_float else INTEGERS, ((groups, 1),), "offset of each group"
        ),
    }
    return RepackedLinear(
        module,
        (INT_SHIFTED if is_float else INT_GROUPS)[bits],
        PLAIN,
        shape,
        keys,
        tensors=tensors,
        repack=partial(_repack, bits=bits, shape=shape, where=f"{header.path}: {keys['shift']}"),
    )


def _bits(info: TensorInfo, scale: TensorInfo) -> int:
    """Return the bits of a code: the number with which groups and rows of bytes agree."""
    if len(info.shape) == 2 and len(scale.shape) == 2 and 0 not in (*info.shape, *scale.shape):
        fitting = [b for b in INT_SHIFTED if -(-scale.shape[0] * b // 8) == info.shape[0]]
        if len(fitting) == 1:
            return fitting[0]
    raise ShapeMismatch(
        f"{info.file}: {info.name} has shape {list(info.shape)}, which codes of 2 or 4 bits with "
        f"a scale of {list(scale.shape)} do not give, or not alone (quanto)",
        "export or download the file again.",
    )


def _shape(header: Header, module: str, groups: int, size: int, bits: int) -> tuple[int, int]:
    """Return the shape of a matrix of `groups` groups: its bias or its model shows it.

    Raises  UnreadFormat if nothing does, ShapeMismatch if it cannot be
    """
    bias = header.tensors.get(f"{module}.bias")
    rows = bias.shape[0] if bias is not None and bias.shape else _rows_of_model(header, module)
    if rows is None:
        raise UnreadFormat(
            f"{header.path}: {module}{PACKED} has {groups:,} groups of {size}, and neither a bias "
            "nor a config.json shows how many belong to a row",
            "put the model's config.json into the folder.",
        )
    if rows < 1 or groups % rows or groups // rows * size * bits % 8:
        raise ShapeMismatch(
            f"{header.path}: {module}{PACKED} has {groups:,} groups of {size} codes, expected "
            f"{rows:,} rows of whole groups and bytes"
        )
    return rows, groups // rows * size


def _rows_of_model(header: Header, module: str) -> int | None:
    """Return the output features of a layer of the model in config.json, or None."""
    name = header.config.get("_class_name")
    if not isinstance(name, str):
        return None
    weights = dict(
        outline_model(name, header.config, f"{header.path}: config.json").named_parameters()
    )
    weight = weights.get(f"{module}.weight")
    return None if weight is None or weight.ndim != 2 else weight.shape[0]


def _repack(tensors: Parts, bits: int, shape: tuple[int, int], where: str) -> dict[str, Tensor]:
    """Return the parts of a weight from quanto's tensors."""
    packed, scale, shift = tensors["packed"], tensors["scale"], tensors["shift"]
    places: Iterable[int] = range(0, 8, bits)
    codes = torch.cat([packed >> place & 2**bits - 1 for place in places])[: len(scale)]
    rows = shape[0]
    parts = {
        "codes": pack_codes(codes.reshape(shape), bits),
        "block_scale": scale.reshape(rows, -1),
    }
    if shift.dtype in FLOAT_DTYPES:
        parts["block_shift"] = shift.reshape(rows, -1)
    else:
        parts["zero_point"] = _zero_points(shift, bits, where).reshape(rows, -1)
    return parts | ({"bias": tensors["bias"]} if "bias" in tensors else {})


def _zero_points(shift: Tensor, bits: int, where: str) -> Tensor:
    """Return integer shifts as uint8. Raises BrokenFile if one is no code."""
    if not shift.is_meta and not bool(((shift >= 0) & (shift < 2**bits)).all()):
        raise BrokenFile(f"{where} holds values from {shift.min()} to {shift.max()}")
    return shift.to(torch.uint8)
