"""Writing NVIDIA ModelOpt's Hugging Face export, as ModelOpt 0.47 does; `modelopt.py` describes the tensors."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from mezzotint._version import VERSION
from mezzotint.formats.writing import Declaration, DiffusersNames, Pieces, Refusal, Written, in_pieces, scalar, unplaced
from mezzotint.tensor import QuantTensor

TITLE = "ModelOpt"
PRODUCER = {"name": "mezzotint", "version": VERSION}
COMMON = {
    "input_scale": ".input_scale",
    "bias": ".bias",
    "pre_quant_scale": ".pre_quant_scale",
    "lora_down": ".svdquant_lora_a",
    "lora_up": ".svdquant_lora_b",
}
SUFFIXES = {
    "fp8": {"codes": ".weight", "weight_scale": ".weight_scale"} | COMMON,
    "nvfp4": {"codes": ".weight", "block_scale": ".weight_scale", "global_scale": ".weight_scale_2"} | COMMON,
}
SCALARS = {"weight_scale", "global_scale", "input_scale"}
WEIGHTS: dict[str, dict[str, Any]] = {
    "fp8": {"dynamic": False, "num_bits": 8, "type": "float"},
    "nvfp4": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
}


class ModelOptWriter(DiffusersNames):
    name = "modelopt"
    title = "NVIDIA ModelOpt HF export"
    file = False

    def layer(self, group: Mapping[str, Pieces]) -> Written | Refusal:
        tensors: dict[str, Tensor] = {}
        for module, pieces in group.items():
            if len(pieces) > 1:
                return in_pieces(pieces, TITLE)
            (piece,) = pieces
            refusal = _refusal(piece)
            if refusal is not None:
                return refusal
            suffixes = SUFFIXES[piece.scheme.name]
            tensors |= {
                module + suffixes[part]: scalar(value) if part in SCALARS else value
                for part, value in piece.parts.items()
            }
        return Written(tensors)

    def declare(self, layers: Mapping[str, Pieces], plain: Collection[str]) -> Declaration | Refusal:
        weights = [piece for pieces in layers.values() for piece in pieces]
        if not weights:
            return Declaration()
        algorithm = _algorithm(weights)
        if isinstance(algorithm, Refusal):
            return algorithm
        numbers = WEIGHTS[weights[0].scheme.name]
        group: dict[str, Any] = {"weights": numbers, "targets": ["Linear"]}
        if "input_scale" in weights[0].parts:
            group = {"input_activations": numbers} | group
        entries = {"config_groups": {"group_0": group}, "ignore": sorted(_unquantized_linears(plain))} | algorithm
        return Declaration(entries | {"producer": PRODUCER, "quant_method": "modelopt"})


WRITER = ModelOptWriter()


def _refusal(piece: QuantTensor) -> Refusal | None:
    if piece.scheme.name not in SUFFIXES:
        return Refusal(f"is {piece.scheme.title}, and {TITLE} holds FP8 and NVFP4")
    if piece.scheme.name == "fp8" and piece.parts["weight_scale"].numel() != 1:
        return Refusal(f"has one FP8 scale for each row, and {TITLE} has one for the matrix")
    if piece.scheme.name == "fp8" and "input_scale" not in piece.parts:
        return Refusal(f"has no input_scale, and {TITLE}'s FP8 needs one; --scales-from FILE may have it")
    return unplaced(piece, SUFFIXES[piece.scheme.name], TITLE)


def _algorithm(weights: list[QuantTensor]) -> dict[str, Any] | Refusal:
    """`quant_algo`, and `lora_rank` where there is one."""
    schemes = sorted({weight.scheme.title for weight in weights})
    if len(schemes) > 1:
        return Refusal(f"the layers are {' and '.join(schemes)}, and {TITLE}'s configuration declares one algorithm")
    static = {"input_scale" in weight.parts for weight in weights}
    if len(static) > 1:
        number = sum("input_scale" not in weight.parts for weight in weights)
        return Refusal(f"{number} of {len(weights)} layers have no input_scale; --scales-from FILE may have them")
    if weights[0].scheme.name == "fp8":
        return {"quant_algo": "FP8"}
    ranks = {weight.parts["lora_down"].shape[0] for weight in weights if "lora_down" in weight.parts}
    if ranks:
        return {"quant_algo": "NVFP4_SVD", "lora_rank": max(ranks)}
    if any("pre_quant_scale" in weight.parts for weight in weights):
        return {"quant_algo": "NVFP4_AWQ"}
    return {"quant_algo": "NVFP4" if static == {True} else "W4A16_NVFP4"}


def _unquantized_linears(plain: Collection[str]) -> Iterable[str]:
    return {name.removesuffix(".weight") for name in plain if name.endswith(".weight")}
