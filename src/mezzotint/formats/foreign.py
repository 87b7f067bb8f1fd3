"""Formats that are not read, named in one line by their marks: tensors' names and dtypes, and what is declared.

Every rule looks at what only one tool writes. It is asked before any format that is read here, because several of these
files look like one: bitsandbytes' bytes beside Black Forest Labs' names are taken for NVFP4 otherwise.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from mezzotint.errors import UnreadFormat, listed
from mezzotint.formats.header import Header
from mezzotint.formats.safetensors_file import TensorInfo
from mezzotint.schemes import Shape
from mezzotint.schemes.scheme import FLOATS

DECLARED = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "autoround": "AutoRound",
    "intel/auto-round": "AutoRound",
    "awq": "AWQ (AutoAWQ)",
    "bitsandbytes": "bitsandbytes",
    "bnb": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp8": "FP8 with a scale for each block (quant_method fp8)",
    "finegrained_fp8": "FP8 with a scale for each block (quant_method finegrained_fp8)",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "mlx": "MLX",
    "mxfp4": "MXFP4",
    "optimum-quanto": "quanto",
    "quanto": "quanto",
    "quark": "AMD Quark",
    "sdnq": "SDNQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
"""{quant_method of a configuration: what it is called}"""
READ = ("mezzotint", "modelopt", "nunchaku", "svdquant")
"""What a quant_method is in files that are read."""
HINT = "take the model in BF16, or quantized by ModelOpt, ComfyUI, Black Forest Labs or Nunchaku."
BNB_STATE = re.compile(r".+\.quant_state\.bitsandbytes__(\w+)")
TORCHAO = re.compile(r".+[.:_](qdata|tensor_impl|_data_impl|layout_tensor|int_data)")
SCALES = (".weight_scale", ".scale_weight", ".weight_scale_inv")
CODES = (torch.float8_e4m3fn, torch.int8)


@dataclass(frozen=True)
class Rule:
    """A mark of a format: which tensors have it, and how the format is called."""

    name: str
    marks: Callable[[Header, TensorInfo], bool]


def ends(*suffixes: str) -> Callable[[Header, TensorInfo], bool]:
    """Whether a tensor's name ends in one of these."""
    return lambda _header, info: info.name.endswith(suffixes)


def beside(suffix: str, *others: str) -> Callable[[Header, TensorInfo], bool]:
    """Whether a tensor's name ends in `suffix` and the layer has all these besides."""

    def marked(header: Header, info: TensorInfo) -> bool:
        module = info.name.removesuffix(suffix)
        return info.name.endswith(suffix) and all(module + other in header.tensors for other in others)

    return marked


def _is_packed_words(header: Header, info: TensorInfo) -> bool:
    return info.dtype is torch.uint32 and beside(".weight", ".scales")(header, info)


def _is_e5m2(_header: Header, info: TensorInfo) -> bool:
    return info.dtype is torch.float8_e5m2


def _has_block_scale(header: Header, info: TensorInfo) -> bool:
    """Whether a weight in FP8 or INT8 has a scale for each block of its columns."""
    module = info.name.removesuffix(".weight")
    if info.dtype not in CODES or module == info.name or len(info.shape) != 2:
        return False
    scales = (header.tensors.get(module + suffix) for suffix in SCALES)
    return any(s is not None and s.dtype in FLOATS and _in_blocks(info.shape, s.shape) for s in scales)


def _in_blocks(weight: Shape, scale: Shape) -> bool:
    """Whether a scale of this shape has one number for each of several blocks of columns or of rows."""
    sides = scale[:-1] if len(scale) == 3 and scale[-1] == 1 else scale
    if len(sides) != 2 or 0 in sides:
        return False
    whole = all(-(-own // -(-own // part)) == part for own, part in zip(weight, sides, strict=True) if own)
    return whole and (sides[1] > 1 or 1 < sides[0] < weight[0])


RULES = (
    Rule("bitsandbytes (NF4 or FP4)", lambda _header, info: BNB_STATE.fullmatch(info.name) is not None),
    Rule("bitsandbytes (NF4 or FP4)", beside(".weight.absmax", ".weight.quant_map")),
    Rule("bitsandbytes (LLM.int8)", beside(".SCB", ".weight")),
    Rule("MLX", _is_packed_words),
    Rule("MLX", beside(".biases", ".scales", ".weight")),
    Rule("quanto", ends(".weight._data", ".weight._scale", ".weight._packed")),
    Rule("compressed-tensors", ends(".weight_packed", ".weight_global_scale")),
    Rule("GPTQ, as AutoRound and AutoGPTQ write it", beside(".qweight", ".qzeros", ".scales")),
    Rule("torchao", lambda _header, info: TORCHAO.fullmatch(info.name) is not None),
    Rule("SDNQ", beside(".scale", ".weight", ".zero_point")),
    Rule("SDNQ", beside(".svd_up", ".svd_down", ".weight", ".scale")),
    Rule("SDNQ", lambda header, info: _is_codes_with_scale(header, info)),
    Rule("HQQ", ends(".W_q")),
    Rule("FP8 with a scale for each block", ends(".weight_scale_inv")),
    Rule("FP8 or INT8 with a scale for each block", _has_block_scale),
    Rule("FP8 in e5m2", _is_e5m2),
)


def _is_codes_with_scale(header: Header, info: TensorInfo) -> bool:
    """Whether a quantized weight has a `.scale` beside it, which norms of unquantized models have, too."""
    weight = header.tensors.get(info.name.removesuffix(".scale") + ".weight")
    return info.name.endswith(".scale") and weight is not None and weight.dtype not in FLOATS


def refuse_foreign(header: Header) -> None:
    """Raise UnreadFormat, naming the format in one line, if the file is in one that is known and not read."""
    for rule in RULES:
        marked = [name for name, info in header.tensors.items() if rule.marks(header, info)]
        if marked:
            raise _refused(header, rule.name, listed(marked, 1))
    for where, name in _declared(header):
        raise _refused(header, name, where)


def _refused(header: Header, name: str, evidence: str) -> UnreadFormat:
    return UnreadFormat(f"{header.path}: is in the format of {name} ({evidence}), which is not read", HINT)


def _declared(header: Header) -> Iterator[tuple[str, str]]:
    """(where a foreign format is declared, what it is called)"""
    declared = header.config.get("quantization_config")
    if isinstance(declared, Mapping) and isinstance(declared.get("quant_method"), str):
        method = declared["quant_method"].lower()
        if method not in READ:
            yield f"config.json: quant_method {method}", DECLARED.get(method, repr(declared["quant_method"]))
        elif method == "modelopt" and "quant_type" in declared and "quant_algo" not in declared:
            yield "config.json: quant_method modelopt with quant_type", "diffusers' own ModelOpt checkpoints"
    for key in header.metadata:
        if key.startswith(("mflux", "mlx_")):
            yield f"{key} in the header", "MLX"
        if key.startswith("sdnq"):
            yield f"{key} in the header", "SDNQ"


def unnamed(header: Header) -> str | None:
    """What a file that no format recognises is called, where its codes have scales that nothing says the format of."""
    scaled = [
        info
        for name, info in header.tensors.items()
        if info.dtype in CODES and name.endswith(".weight") and name + "_scale" in header.tensors
    ]
    if not scaled:
        return None
    first = scaled[0]
    per_row = header.tensors[first.name + "_scale"].shape[:1] == first.shape[:1]
    who = "LightX2V (or of ComfyUI, its notes lost)" if per_row else "ComfyUI, its notes lost (or of LightX2V)"
    return f"is in the format of {who}: {len(scaled)} weights such as {first.name} have a weight_scale, and no note"
