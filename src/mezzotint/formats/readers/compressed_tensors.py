"""Read compressed-tensors, as llm-compressor and vLLM-Omni write it.

float-quantized        X.weight e4m3 [out, in],  X.weight_scale [1], [out, 1] (channel),
                       [out/128, in/128] (block) or [out, in/group]
int-quantized          X.weight i8 [out, in],  X.weight_scale [1], [out, 1] or [out, in/group]
nvfp4-pack-quantized   X.weight_packed u8 [out, in/2], low nibble first,  X.weight_scale e4m3
                       [out, in/16],  X.weight_global_scale f32 [1], which divides
mxfp8-quantized        X.weight e4m3,  X.weight_scale u8 [out, in/32], exponents
pack-quantized         X.weight_packed i32 [out, in * bits / 32],  X.weight_scale [out, in/group],
                       X.weight_shape i64 [2],  X.weight_zero_point i32, packed along out

Signed codes are packed with 2^(bits - 1) added. Static input scales are X.input_scale, or
X.input_global_scale, which divides. The tensors show a layer's kind; config.json states the number
of bits, the size of blocks, and how inputs are quantized.
Source: https://github.com/vllm-project/compressed-tensors (compressors/)
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Len
from pydantic import Field, PositiveInt
from torch import Tensor

from mezzotint.containers import read_all
from mezzotint.errors import BrokenFile, MissingTensor, ShapeMismatch, UnknownFormat, UnreadFormat
from mezzotint.formats.blocks import block_count, infer_block, linear_in_blocks
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.formats.readers.mezzotint import quantization_config
from mezzotint.formats.repacked import RepackedLinear, stored
from mezzotint.schemes import (
    FP8,
    INT8,
    INT_GROUPS,
    MXFP8,
    NVFP4,
    Parts,
    Scheme,
    Shape,
)
from mezzotint.schemes.int_groups import unpack_codes
from mezzotint.schemes.scheme import FLOAT32, FLOAT_DTYPES
from mezzotint.tensor import PLAIN
from mezzotint.untrusted.escaping import shown
from mezzotint.untrusted.schema import Entries, validated

METHOD = "compressed-tensors"
PACKED, SCALE, SHAPE, ZERO = (
    *(".weight_packed", ".weight_scale"),
    *(".weight_shape", ".weight_zero_point"),
)
MARKS = (PACKED, ".weight_global_scale")
WORD = 32
E4M3 = torch.float8_e4m3fn


class Weights(Entries):
    """How config.json says that a group's weights are quantized."""

    num_bits: PositiveInt
    type: Literal["int", "float"]
    symmetric: bool = True
    strategy: str | None = None
    block_structure: Annotated[list[PositiveInt], Len(2, 2)] | None = None


class Inputs(Entries):
    """How config.json says that a group's inputs are quantized."""

    num_bits: PositiveInt
    type: Literal["int", "float"]
    strategy: str | None = None
    dynamic: bool | Literal["local"] = False


class ConfigGroup(Entries):
    weights: Weights | None = None
    input_activations: Inputs | None = None
    output_activations: dict[str, Any] | None = None


class Declared(Entries):
    """The entries of quantization_config that decide what the tensors mean."""

    config_groups: dict[str, ConfigGroup] = Field(default_factory=dict)
    kv_cache_scheme: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


class CompressedTensors:
    name = "compressed_tensors"
    title = "compressed-tensors"

    def detect(self, header: Header) -> Match | NoMatch:
        if quantization_config(header).get("quant_method") == METHOD:
            return Match(f"config.json: quant_method {METHOD}", certain=True)
        marked = next((name for name in header.tensors if name.endswith(MARKS)), None)
        if marked is not None:
            return Match(f"{marked} is there", certain=True)
        return NoMatch(f"no quant_method {METHOD} in config.json, and no {PACKED}")

    def contents(self, header: Header) -> Contents:
        declared = _declared(header)
        modules = list(dict.fromkeys(_modules(header)))
        shapes = _packed_shapes(header, modules)
        linears = {
            module: _linear(header, module, declared, shapes.get(module)) for module in modules
        }
        if not linears:
            raise MissingTensor(
                f"{header.path}: config.json declares {METHOD}, and no layer is quantized",
                "restore the config.json that came with these weights.",
            )
        counts = Counter(linear.scheme.title for linear in linears.values())
        said = ", ".join(f"{count} layers {title}" for title, count in counts.items())
        found = classify_tensors(header, linears, {})
        return Contents(found.linears, found.plain, found.ignored, evidence=(said,))


FORMAT = CompressedTensors()


def _declared(header: Header) -> Declared:
    """Return the declaration. Raises UnreadFormat for what changes the weights and is not read."""
    where = f"{header.path}: quantization_config of config.json"
    declared = validated(Declared, quantization_config(header), where)
    for entry in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        value = getattr(declared, entry)
        if value and value.get("format") != "dense" and value.get("config_groups", True):
            raise UnreadFormat(f"{where} has {entry} {shown(value)}, which is not read")
    if any(group.output_activations for group in declared.config_groups.values()):
        raise UnreadFormat(f"{where} quantizes the outputs of layers, which is not supported")
    return declared


def _modules(header: Header) -> Iterator[str]:
    """Yield the layers with packed codes, and those whose weight is codes."""
    for name, info in header.tensors.items():
        if name.endswith(PACKED):
            yield name.removesuffix(PACKED)
        elif name.endswith(".weight") and info.dtype in (E4M3, torch.int8):
            yield name.removesuffix(".weight")


def _packed_shapes(header: Header, modules: list[str]) -> dict[str, tuple[int, int]]:
    """Return {module: [out, in]} of the layers whose shape is a tensor."""
    named = {m: header.tensors[m + SHAPE] for m in modules if m + SHAPE in header.tensors}
    for info in named.values():
        if info.shape != (2,) or info.dtype not in (torch.int64, torch.int32):
            raise ShapeMismatch(
                f"{info.file}: {info.name} is {info.dtype} {list(info.shape)}, "
                "expected two integers"
            )
    shapes: dict[str, tuple[int, int]] = {}
    for (module, info), values in zip(named.items(), read_all(list(named.values())), strict=True):
        rows, columns = values.tolist()
        if rows <= 0 or columns <= 0:
            raise BrokenFile(f"{info.file}: {info.name} holds {rows}, {columns}")
        shapes[module] = (rows, columns)
    return shapes


def _linear(
    header: Header, module: str, declared: Declared, shape: tuple[int, int] | None
) -> StoredLinear:
    """Return a quantized layer; its tensors decide which kind it is."""
    if f"{module}.weight_g_idx" in header.tensors:
        raise UnreadFormat(
            f"{header.path}: {module}.weight_g_idx reorders the columns of the weight (GPTQ with "
            "activation ordering), which is not read",
            "quantize the model with actorder null or weight.",
        )
    packed = header.tensors.get(module + PACKED)
    if packed is None:
        return _unpacked(header, module, declared)
    if packed.dtype is torch.int32:
        return _pack_quantized(header, module, declared, shape)
    if f"{module}.weight_global_scale" not in header.tensors and _is_mx(header, module):
        raise UnreadFormat(
            f"{header.path}: {module} is in mxfp4-pack-quantized, which is not read",
            "use an NVFP4, FP8 or BF16 model.",
        )
    return _nvfp4(header, module, declared)


def _is_mx(header: Header, module: str) -> bool:
    scale = header.tensors.get(module + SCALE)
    return scale is not None and scale.dtype is torch.uint8


def _bias(header: Header, module: str) -> dict[str, str]:
    return {"bias": f"{module}.bias"} if f"{module}.bias" in header.tensors else {}


def _shape(header: Header, name: str) -> tuple[int, int]:
    """Return the shape of codes. Raises ShapeMismatch unless they are a matrix."""
    info = header.tensors[name]
    if len(info.shape) != 2 or 0 in info.shape:
        raise ShapeMismatch(
            f"{info.file}: {name} has shape {list(info.shape)}, expected a matrix of codes"
        )
    return info.shape[0], info.shape[1]


def _inputs(header: Header, module: str, declared: Declared, scheme: Scheme) -> Inputs | None:
    """Return how the layer's inputs are quantized, by the groups that its weights can belong to.

    Raises   UnknownFormat if such groups disagree
    """
    kind = "int" if scheme.name.startswith("int") else "float"
    fitting = [
        group.input_activations
        for group in declared.config_groups.values()
        if group.weights is not None
        and (group.weights.type, group.weights.num_bits) == (kind, scheme.bits)
    ]
    if any(inputs != fitting[0] for inputs in fitting):
        raise UnknownFormat(
            f"{header.path}: config_groups has several ways to quantize the inputs of {module}",
            "such mixed files are not read; use a file with one way for each kind of weight.",
        )
    return fitting[0] if fitting else None


def _unpacked(header: Header, module: str, declared: Declared) -> StoredLinear:
    """Return a layer of float-quantized, mxfp8-quantized or int-quantized."""
    weight, scale = header.tensors[f"{module}.weight"], header.tensors.get(module + SCALE)
    keys = {"codes": weight.name, "weight_scale": module + SCALE} | _bias(header, module)
    rows, columns = _shape(header, weight.name)
    is_float = weight.dtype is E4M3
    if is_float and _is_mx(header, module):
        keys["block_scale"] = keys.pop("weight_scale")
        return StoredLinear(module, MXFP8, PLAIN, (rows, columns), keys, dynamic_input=True)
    scheme = FP8 if is_float else INT8
    whole: tuple[Shape, ...] = ((), (1,), (rows,), (rows, 1))
    if module + ZERO in header.tensors or (scale is not None and scale.shape not in whole):
        return _grouped(header, module, declared, (rows, columns))
    inputs = _inputs(header, module, declared, scheme)
    if inputs is not None and not inputs.dynamic:
        keys["input_scale"] = f"{module}.input_scale"
    return StoredLinear(
        module,
        scheme,
        PLAIN,
        (rows, columns),
        keys,
        dynamic_input=inputs is not None and bool(inputs.dynamic),
    )


def _grouped(
    header: Header, module: str, declared: Declared, shape: tuple[int, int]
) -> StoredLinear:
    """Return an FP8 or INT8 layer with a scale per block or group, or with zero points."""
    zero = module + ZERO if module + ZERO in header.tensors else None
    block = _block(header, module, declared, shape)
    return linear_in_blocks(header, module, module + SCALE, block, zero)


def _block(
    header: Header, module: str, declared: Declared, shape: tuple[int, int]
) -> tuple[int, int]:
    """Return the rows and columns that share a scale."""
    scale = header.tensors.get(module + SCALE)
    found = (*(() if scale is None else scale.shape), 1, 1)[:2]
    structures = {
        (group.weights.block_structure[0], group.weights.block_structure[1])
        for group in declared.config_groups.values()
        if group.weights is not None
        and group.weights.block_structure
        and group.weights.strategy == "block"
    }
    fitting = (block for block in structures if block_count(shape, block) == found)
    return next(fitting, None) or infer_block(header, module, module + SCALE)


def _nvfp4(header: Header, module: str, declared: Declared) -> StoredLinear:
    """Return an NVFP4 layer; its outer scales are stored as divisors."""
    rows, half = _shape(header, module + PACKED)
    shape = (rows, half * 2)
    keys = {
        "codes": module + PACKED,
        "block_scale": module + SCALE,
        "global_scale": f"{module}.weight_global_scale",
    } | _bias(header, module)
    tensors = {
        "global_scale": stored(FLOAT32, ((1,), ()), "divisor of the scales", scale=True),
    }
    inputs = _inputs(header, module, declared, NVFP4)
    if inputs is not None and (inputs.num_bits, inputs.type) != (4, "float"):
        raise UnreadFormat(
            f"{header.path}: {module} has NVFP4 weights and inputs of {inputs.num_bits} bits "
            f"({inputs.type}), which no scheme computes"
        )
    if inputs is not None and inputs.dynamic is not True:
        keys["input_scale"] = f"{module}.input_global_scale"
        tensors["input_scale"] = stored(
            FLOAT32, ((1,), ()), "divisor of the input's scale", scale=True
        )
    return RepackedLinear(
        module,
        NVFP4,
        PLAIN,
        shape,
        keys,
        dynamic_input=inputs is not None and inputs.dynamic is True,
        tensors=tensors,
        repack=_repack_nvfp4,
    )


def _repack_nvfp4(tensors: Parts) -> dict[str, Tensor]:
    divisors = ("global_scale", "input_scale")
    parts = {
        name: value.reshape(()).reciprocal() if name in divisors else value
        for name, value in tensors.items()
    }
    # Kernels multiply. The tool divides, which rounds once less.
    return parts | {"global_divisor": tensors["global_scale"].reshape(())}


def _pack_quantized(
    header: Header, module: str, declared: Declared, shape: tuple[int, int] | None
) -> StoredLinear:
    """Return a layer of integers in 32-bit words."""
    if shape is None:
        raise MissingTensor(
            f"{header.path}: {module}{SHAPE} is not there, and {module}{PACKED} needs it "
            "(shape of the weight)",
            "export or download the file again.",
        )
    rows, columns = shape
    bits = _bits(header, module, declared, columns)
    scale = header.tensors.get(module + SCALE)
    groups = (*(() if scale is None else scale.shape), 1, 1)[1] or 1
    keys = {"packed": module + PACKED, "scale": module + SCALE, "shape": module + SHAPE}
    tensors = {
        "packed": stored((torch.int32,), ((rows, _words(columns, bits)),), "packed codes"),
        "shape": stored((torch.int64, torch.int32), ((2,),), "shape of the weight"),
        "scale": stored(
            FLOAT_DTYPES,
            ((rows, groups), *(((1,), ()) if groups == 1 else ())),
            "scale of each group",
            scale=True,
        ),
    }
    if module + ZERO in header.tensors or _is_asymmetric(declared, bits):
        keys["zero"] = module + ZERO
        zeros = (_words(rows, bits), groups)
        tensors["zero"] = stored((torch.int32,), (zeros,), "packed zero points")
    return RepackedLinear(
        module,
        INT_GROUPS[bits],
        PLAIN,
        shape,
        keys | _bias(header, module),
        tensors=tensors,
        repack=partial(_repack_words, bits=bits, shape=shape),
    )


def _words(count: int, bits: int) -> int:
    return -(-count * bits // WORD)


def _is_asymmetric(declared: Declared, bits: int) -> bool:
    """Return whether the declaration calls for zero points."""
    weights = [group.weights for group in declared.config_groups.values() if group.weights]
    fitting = [each for each in weights if (each.type, each.num_bits) == ("int", bits)]
    return bool(fitting) and not any(each.symmetric for each in fitting)


def _bits(header: Header, module: str, declared: Declared, columns: int) -> int:
    """Return the bits of a code: the declared number that gives the width of the packed codes."""
    info = header.tensors[module + PACKED]
    width = (*info.shape, 0, 0)[1]
    weights = [group.weights for group in declared.config_groups.values() if group.weights]
    stated = {each.num_bits for each in weights if each.type == "int"} or set(INT_GROUPS)
    fitting = [bits for bits in INT_GROUPS if bits in stated and _words(columns, bits) == width]
    if len(fitting) != 1:
        raise ShapeMismatch(
            f"{info.file}: {info.name} has shape {list(info.shape)}, which {columns} columns of "
            f"{' or '.join(map(str, sorted(stated)))} bits do not give, or not alone",
            "restore the config.json that came with these weights.",
        )
    if columns * fitting[0] % 8:
        raise ShapeMismatch(
            f"{info.file}: {info.name} has {columns} columns of {fitting[0]} bits, "
            "expected rows of whole bytes",
            "use the BF16 model.",
        )
    return fitting[0]


def _repack_words(tensors: Parts, bits: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Return the parts: a row of 32-bit words is a row of bits, lowest first."""
    rows, columns = shape
    packed = tensors["packed"].view(torch.uint8)[:, : columns * bits // 8].contiguous()
    scale = tensors["scale"]
    parts = {"codes": packed, "block_scale": scale if scale.ndim == 2 else scale.expand(rows, 1)}
    if "zero" in tensors:
        words = tensors["zero"].t().clone(memory_format=torch.contiguous_format).view(torch.uint8)
        parts["zero_point"] = unpack_codes(words, bits)[:, :rows].t().contiguous()
    return parts | ({"bias": tensors["bias"]} if "bias" in tensors else {})
