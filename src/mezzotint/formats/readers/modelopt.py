"""Read NVIDIA ModelOpt's Hugging Face export: diffusers names, row-major, low nibble first.

FP8     X.weight e4m3 [out, in],  X.weight_scale f32 [],              X.input_scale f32 []
NVFP4   X.weight u8 [out, in/2],  X.weight_scale e4m3 [out, in/16],   X.weight_scale_2 f32 [],
        X.input_scale f32 []
INT8    X.weight i8 [out, in],    X.weight_scale f32 [out],           X.input_scale f32 []
AWQ, SmoothQuant, SVD   also X.pre_quant_scale [in]
SVD                     also X.svdquant_lora_a [rank, in],  X.svdquant_lora_b [out, rank]
W4A16                   without X.input_scale

The tensors show which layers are quantized; the `ignore` list of the configuration is not needed.
A BF16 layer with a pre_quant_scale or a low-rank part is stored transformed. The reader applies
these.
Configuration and tensors must agree: a file that declares FP8 and holds NVFP4 is refused.
"""

from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch

from mezzotint.containers import DType, TensorInfo
from mezzotint.errors import UnknownFormat, UnreadFormat
from mezzotint.formats.components import COMFY_METADATA
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.schemes import BF16, FP8, INT8, NVFP4, Scheme
from mezzotint.tensor import PLAIN
from mezzotint.untrusted.escaping import shown

SCHEME_OF_DTYPE: Mapping[DType, Scheme] = {
    torch.float8_e4m3fn: FP8,
    torch.uint8: NVFP4,
    torch.int8: INT8,
}
SUFFIXES: dict[str, dict[str, str]] = {
    "fp8": {"codes": ".weight", "weight_scale": ".weight_scale"},
    "nvfp4": {
        "codes": ".weight",
        "block_scale": ".weight_scale",
        "global_scale": ".weight_scale_2",
    },
    "int8": {"codes": ".weight", "weight_scale": ".weight_scale"},
    "mxfp8": {"codes": ".weight", "block_scale": ".weight_scale"},
    "bf16": {"codes": ".weight"},
}
TRANSFORMS = {
    "pre_quant_scale": ".pre_quant_scale",
    "lora_down": ".svdquant_lora_a",
    "lora_up": ".svdquant_lora_b",
}
LOW_RANK = {"lora_down", "lora_up"}
OPTIONAL_SUFFIXES = {"input_scale": ".input_scale", "bias": ".bias"} | TRANSFORMS
SCHEME_OF_ALGO = {
    "FP8": FP8,
    "NVFP4": NVFP4,
    "NVFP4_AWQ": NVFP4,
    "NVFP4_SVD": NVFP4,
    "W4A16_NVFP4": NVFP4,
    "W8A8_SQ_PER_CHANNEL": INT8,
}
WEIGHT_ONLY = {"W4A16_NVFP4"}
WITH_LOW_RANK = {"NVFP4_SVD"}
QUANTIZER_STATE = "_quantizer."
IGNORE_KEYS = ("ignore", "exclude_modules")


class ModelOpt:
    name = "modelopt"
    title = "NVIDIA ModelOpt HF export"

    def detect(self, header: Header) -> Match | NoMatch:
        config = declared_quantization(header)
        if config.get("quant_method") != "modelopt":
            return NoMatch(
                "neither config.json nor hf_quant_config.json declares a quantization by modelopt"
            )
        if COMFY_METADATA in header.metadata:
            return NoMatch(
                f"{COMFY_METADATA} in the header: ModelOpt has post-processed it for ComfyUI"
            )
        if not any(
            _is_quantized(info) or _is_transformed(header, info) for info in header.tensors.values()
        ):
            return NoMatch(
                f"{config['file']} declares {config.get('quant_algo')}, and no weight is quantized"
            )
        if "modelopt_state" in config or "quant_type" in config:
            return NoMatch("its quantization_config is that of diffusers' ModelOpt checkpoints")
        producer = config["producer"]
        made_by = (
            f"{producer.get('name', 'modelopt')} {producer.get('version', 'of unknown version')}"
        )
        algo = config.get("quant_algo")
        return Match(
            f"{config['file']}: quant_method modelopt, quant_algo {algo}, by {made_by}; "
            "layout as ModelOpt's"
        )

    def contents(self, header: Header) -> Contents:
        _check_configurations_agree(header)
        return read_contents(header, declared_quantization(header))


FORMAT = ModelOpt()


def read_contents(header: Header, config: Mapping[str, Any]) -> Contents:
    """Return the contents, checked against a flat configuration; every layer is row-major."""
    declared = _declared_parts(config)
    linears = {
        info.name.removesuffix(".weight"): _linear(header, info, declared)
        for info in header.tensors.values()
        if _is_quantized(info) or _is_transformed(header, info)
    }
    _check_declared(header, config, linears)
    ignored = {
        key: "state of a calibration quantizer" for key in header.tensors if QUANTIZER_STATE in key
    }
    return classify_tensors(header, linears, ignored)


def declared_quantization(header: Header) -> Mapping[str, Any]:
    """Return the flat quantization of a configuration, and its `file`; {} if none declares one."""
    return next(_declarations(header), {})


def _declarations(header: Header) -> Iterator[Mapping[str, Any]]:
    files = {
        "config.json": header.config.get("quantization_config"),
        "hf_quant_config.json": header.hf_quant_config,
    }
    for file, declared in files.items():
        if isinstance(declared, dict) and declared:
            yield {"file": file, **flatten_declaration(declared)}


def _check_configurations_agree(header: Header) -> None:
    algos = {str(config.get("quant_algo")): config["file"] for config in _declarations(header)}
    if len(algos) > 1:
        claims = " and ".join(f"{file} declares {algo}" for algo, file in algos.items())
        raise UnknownFormat(
            f"{header.path}: {claims}",
            "one of the two is from another export; restore the files of these weights.",
        )


def flatten_declaration(declared: Mapping[str, Any]) -> Mapping[str, Any]:
    """Flatten a declaration; the nested form is {"producer": ..., "quantization": {...}}.

    Entries that the reader uses are present, with ModelOpt's types; values of wrong types are
    dropped.
    """
    producer = _as_object(declared.get("producer"))
    nested = declared.get("quantization")
    if isinstance(nested, dict):
        declared = {"quant_method": producer.get("name", "modelopt"), **nested}
    declared = {"quant_method": producer.get("name"), **declared}
    groups = _as_object(declared.get("config_groups"))
    inputs = {
        name: _as_object(_as_object(group).get("input_activations"))
        for name, group in groups.items()
    }
    lists = {name: declared[name] for name in IGNORE_KEYS if isinstance(declared.get(name), list)}
    kept = {name: value for name, value in declared.items() if name not in IGNORE_KEYS}
    return {**kept, "producer": producer, "inputs": inputs, **lists}


def _as_object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _declared_parts(config: Mapping[str, Any]) -> set[str]:
    """Return the optional parts that the declared algorithm gives every quantized layer."""
    algo = str(config.get("quant_algo"))
    dynamic = any(inputs.get("dynamic") for inputs in config["inputs"].values())
    static = set() if algo in WEIGHT_ONLY or dynamic else {"input_scale"}
    return static | (set(TRANSFORMS) if algo in WITH_LOW_RANK else set())


def _is_quantized(info: TensorInfo) -> bool:
    return info.name.endswith(".weight") and info.dtype in SCHEME_OF_DTYPE


def _is_transformed(header: Header, info: TensorInfo) -> bool:
    module = info.name.removesuffix(".weight")
    return info.name.endswith(".weight") and any(
        module + suffix in header.tensors for suffix in TRANSFORMS.values()
    )


def _linear(header: Header, weight: TensorInfo, declared: set[str]) -> StoredLinear:
    scheme = SCHEME_OF_DTYPE.get(weight.dtype, BF16)
    module = weight.name.removesuffix(".weight")
    keys = {part: module + suffix for part, suffix in SUFFIXES[scheme.name].items()}
    keys |= optional_keys(header, module, scheme, set() if scheme is BF16 else declared)
    rows, columns = (*weight.shape, 0, 0)[:2]
    return StoredLinear(
        module, scheme, PLAIN, (rows, columns * 2 if scheme is NVFP4 else columns), keys
    )


def optional_keys(
    header: Header, module: str, scheme: Scheme, expected: Set[str] = frozenset()
) -> dict[str, str]:
    """Return {part: tensor} of optional parts that are present or expected.

    One half of a low-rank pair makes the other half expected.
    """
    known = scheme.parts.keys() | scheme.optional.keys()
    present = {
        part
        for part in OPTIONAL_SUFFIXES.keys() & known
        if module + OPTIONAL_SUFFIXES[part] in header.tensors
    }
    wanted = present | expected | (LOW_RANK if present & LOW_RANK else set())
    return {part: module + suffix for part, suffix in OPTIONAL_SUFFIXES.items() if part in wanted}


def _check_declared(
    header: Header, config: Mapping[str, Any], linears: Mapping[str, StoredLinear]
) -> None:
    """Raise UnknownFormat unless the tensors show the declared algorithm."""
    algo = config.get("quant_algo")
    declared: Scheme | None = SCHEME_OF_ALGO.get(str(algo))
    if declared is None:
        raise UnreadFormat(
            f"{header.path}: quant_algo {shown(algo)} of ModelOpt is not one of "
            f"{', '.join(SCHEME_OF_ALGO)}",
            "this version of Mezzotint reads no other.",
        )
    found = sorted(
        {
            linear.scheme.title
            for linear in linears.values()
            if linear.scheme not in (declared, BF16)
        }
    )
    if found:
        raise UnknownFormat(
            f"{header.path}: {config['file']} declares {algo}, "
            f"and the tensors are {' and '.join(found)}",
            "the configuration is from another export; restore the one of these weights.",
        )
