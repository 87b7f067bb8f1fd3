"""Name the formats that are not read, by tensor names, dtypes and declarations.

Each rule matches what only one tool writes. The rules run before any reader, because some of these
files resemble a format that is read: HQQ's bytes under Black Forest Labs' names look like NVFP4.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from mezzotint.containers import TensorInfo
from mezzotint.containers.gguf import CONTAINER as GGUF
from mezzotint.containers.gguf import VERSION_KEY
from mezzotint.errors import UnreadFormat, join_names
from mezzotint.formats.header import Header
from mezzotint.schemes.scheme import FLOAT_DTYPES

DECLARED = {
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM FP8",
    "gguf": "GGUF",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "mlx": "MLX",
    "mxfp4": "MXFP4",
    "quark": "AMD Quark",
    "spqr": "SpQR",
    "vptq": "VPTQ",
}
"""{quant_method of a configuration: name of the format}"""
READ = (
    *("auto-round", "autoround", "awq", "bitsandbytes", "bnb", "compressed-tensors"),
    *("finegrained_fp8", "fp8", "gptq", "intel/auto-round", "mezzotint", "modelopt", "nunchaku"),
    *("nunchaku_lite", "optimum-quanto", "quanto", "sdnq", "svdquant", "torchao"),
)
"""Values of quant_method in files that are read."""
DESCRIBED = (
    *("auto-round", "autoround", "awq", "compressed-tensors", "gptq", "intel/auto-round"),
    *("sdnq", "torchao"),
)
"""Those whose files describe the scales of each weight."""
HINT = "use the BF16 model, or one quantized by ModelOpt, ComfyUI, Black Forest Labs or Nunchaku."
TORCHAO = re.compile(r".+[.:_](qdata|tensor_impl|_data_impl|layout_tensor|int_data)")
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


@dataclass(frozen=True)
class Rule:
    """The name of a format, and which tensors only its files have."""

    name: str
    marks: Callable[[Header, TensorInfo], bool]


def ends(*suffixes: str) -> Callable[[Header, TensorInfo], bool]:
    """Match tensors whose names end in one of `suffixes`."""
    return lambda _header, info: info.name.endswith(suffixes)


def has_siblings(suffix: str, *siblings: str) -> Callable[[Header, TensorInfo], bool]:
    """Match tensors that end in `suffix` and whose layer has all `siblings`."""

    def marked(header: Header, info: TensorInfo) -> bool:
        module = info.name.removesuffix(suffix)
        return info.name.endswith(suffix) and all(
            module + sibling in header.tensors for sibling in siblings
        )

    return marked


def _is_packed_words(header: Header, info: TensorInfo) -> bool:
    return info.dtype is torch.uint32 and has_siblings(".weight", ".scales")(header, info)


def _describes_itself(header: Header) -> bool:
    """Return whether the file says of itself that it is in a read format with any such scales."""
    declared = header.config.get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    return str(method).lower() in DESCRIBED or "tensor_names" in header.metadata


RULES = (
    Rule("MLX", _is_packed_words),
    Rule("MLX", has_siblings(".biases", ".scales", ".weight")),
    Rule(
        "AutoRound, GPTQ or AWQ, without its configuration",
        lambda header, info: (
            not _describes_itself(header)
            and has_siblings(".qweight", ".qzeros", ".scales")(header, info)
        ),
    ),
    Rule(
        "torchao, without its entries in the header",
        lambda header, info: (
            "tensor_names" not in header.metadata and TORCHAO.fullmatch(info.name) is not None
        ),
    ),
    Rule(
        "SDNQ, without its configuration",
        lambda header, info: not _describes_itself(header) and _is_codes_with_scale(header, info),
    ),
    Rule("HQQ", ends(".W_q")),
)


def _is_codes_with_scale(header: Header, info: TensorInfo) -> bool:
    """Return whether a `.scale` belongs to a quantized weight; some norms have one, too."""
    weight = header.tensors.get(info.name.removesuffix(".scale") + ".weight")
    return info.name.endswith(".scale") and weight is not None and weight.dtype not in FLOAT_DTYPES


def refuse_foreign(header: Header) -> None:
    """Raise UnreadFormat, naming the format, if the file is in one that is known and not read."""
    for rule in RULES:
        marked = [name for name, info in header.tensors.items() if rule.marks(header, info)]
        if marked:
            raise _refused(header, rule.name, join_names(marked, 1))
    for where, name in _declared(header):
        raise _refused(header, name, where)


def _refused(header: Header, name: str, evidence: str) -> UnreadFormat:
    return UnreadFormat(
        f"{header.path}: is in the format of {name} ({evidence}), which is not read", HINT
    )


def _declared(header: Header) -> Iterator[tuple[str, str]]:
    """Yield (where a foreign format is declared, its name)."""
    declared = header.config.get("quantization_config")
    if isinstance(declared, Mapping) and isinstance(declared.get("quant_method"), str):
        method = declared["quant_method"].lower()
        if method not in READ and not (method == GGUF.name and VERSION_KEY in header.metadata):
            yield (
                f"config.json: quant_method {method}",
                DECLARED.get(method, repr(declared["quant_method"])),
            )
        elif method == "modelopt" and "quant_type" in declared and "quant_algo" not in declared:
            yield (
                "config.json: quant_method modelopt with quant_type",
                "diffusers' ModelOpt checkpoints",
            )
    for key in header.metadata:
        if key.startswith(("mflux", "mlx_")):
            yield f"{key} in the header", "MLX"
        if key.startswith("sdnq"):
            yield f"{key} in the header", "SDNQ"


def unnamed(header: Header) -> str | None:
    """Return the likely format of a file that has codes with scales and no declaration."""
    scaled = [
        info
        for name, info in header.tensors.items()
        if info.dtype in CODES and name.endswith(".weight") and name + "_scale" in header.tensors
    ]
    if not scaled:
        return None
    first = scaled[0]
    return (
        f"is in the format of ComfyUI, without its metadata: {len(scaled)} weights such as "
        f"{first.name} have a weight_scale, and nothing declares a format"
    )
