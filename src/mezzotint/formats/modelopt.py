"""NVIDIA ModelOpt's Hugging Face export: diffusers names, row-major scales, low nibble first.

FP8     X.weight e4m3 [out, in],  X.weight_scale f32 [],              X.input_scale f32 []
NVFP4   X.weight u8 [out, in/2],  X.weight_scale e4m3 [out, in/16],   X.weight_scale_2 f32 [],  X.input_scale f32 []

A layer is quantized if its tensors are; `ignore` in config.json is not consulted. The configuration is held against the
tensors: a file that says FP8 and holds NVFP4 is refused.
"""

from collections.abc import Mapping
from typing import Any

import torch

from mezzotint.errors import UnknownFormat
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, sort_out
from mezzotint.formats.header import Header, TensorInfo
from mezzotint.schemes import FP8, NVFP4, Scheme
from mezzotint.tensor import PLAIN

SCHEME_OF_DTYPE = {torch.float8_e4m3fn: FP8, torch.uint8: NVFP4}
SUFFIXES: dict[str, dict[str, str]] = {
    "fp8": {"codes": ".weight", "weight_scale": ".weight_scale"},
    "nvfp4": {"codes": ".weight", "block_scale": ".weight_scale", "global_scale": ".weight_scale_2"},
}
OPTIONAL_SUFFIXES = {"input_scale": ".input_scale", "bias": ".bias"}
COMFY_NOTE = "_quantization_metadata"
SCHEME_OF_ALGO = {"FP8": FP8, "NVFP4": NVFP4}
LEFTOVER = "_quantizer."


class ModelOpt:
    name = "modelopt"
    title = "NVIDIA ModelOpt HF export"

    def detect(self, header: Header) -> Match | NoMatch:
        config = _quantization(header)
        if config.get("quant_method") != "modelopt":
            return NoMatch("config.json has no quantization_config with quant_method modelopt")
        if COMFY_NOTE in header.metadata:
            return NoMatch(f"{COMFY_NOTE} in the header: ModelOpt has post-processed it for ComfyUI")
        if "modelopt_state" in config or "quant_type" in config:
            return NoMatch("its quantization_config is that of diffusers' own ModelOpt checkpoints")
        producer = config.get("producer", {})
        made_by = f"{producer.get('name', 'modelopt')} {producer.get('version', 'of unknown version')}"
        return Match(f"config.json: quant_method modelopt, quant_algo {config.get('quant_algo')}, by {made_by}")

    def contents(self, header: Header) -> Contents:
        static = _declares_static_inputs(_quantization(header))
        linears = {
            info.name.removesuffix(".weight"): _linear(header, info, static)
            for info in header.tensors.values()
            if info.name.endswith(".weight") and info.dtype in SCHEME_OF_DTYPE
        }
        _check_declared(header, linears)
        ignored = {key: "state of a calibration quantizer" for key in header.tensors if LEFTOVER in key}
        return sort_out(header, linears, ignored)


FORMAT = ModelOpt()


def _quantization(header: Header) -> Mapping[str, Any]:
    config = header.config.get("quantization_config")
    return config if isinstance(config, dict) else {}


def _declares_static_inputs(config: Mapping[str, Any]) -> bool:
    groups = config.get("config_groups", {}).values()
    return any(group.get("input_activations", {}).get("dynamic") is False for group in groups)


def _linear(header: Header, weight: TensorInfo, static: bool) -> StoredLinear:
    scheme = SCHEME_OF_DTYPE[weight.dtype]
    module = weight.name.removesuffix(".weight")
    keys = {part: module + suffix for part, suffix in SUFFIXES[scheme.name].items()}
    for part, suffix in OPTIONAL_SUFFIXES.items():
        if module + suffix in header.tensors or (static and part == scheme.static_input):
            keys[part] = module + suffix
    rows, columns = (*weight.shape, 0, 0)[:2]
    return StoredLinear(module, scheme, PLAIN, (rows, columns * 2 if scheme is NVFP4 else columns), keys)


def _check_declared(header: Header, linears: Mapping[str, StoredLinear]) -> None:
    """The algorithm that config.json declares is the one that the tensors show."""
    algo = _quantization(header).get("quant_algo")
    declared: Scheme | None = SCHEME_OF_ALGO.get(str(algo))
    if declared is None:
        raise UnknownFormat(
            f"{header.path}: quant_algo {algo!r} of ModelOpt is not one of {', '.join(SCHEME_OF_ALGO)}",
            "this version of Mezzotint reads ModelOpt's FP8 and NVFP4.",
        )
    found = sorted({linear.scheme.title for linear in linears.values() if linear.scheme is not declared})
    if found:
        raise UnknownFormat(
            f"{header.path}: config.json declares {algo}, and the tensors are {' and '.join(found)}",
            "the configuration is from another export; restore the one that came with these weights.",
        )
