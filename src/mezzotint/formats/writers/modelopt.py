"""Write NVIDIA ModelOpt's Hugging Face export, as ModelOpt 0.47 does.

`formats.readers.modelopt` describes the tensors.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from mezzotint._version import VERSION
from mezzotint.formats.readers.modelopt import OPTIONAL_SUFFIXES, SUFFIXES
from mezzotint.formats.writers.writer import (
    CannotStore,
    Declaration,
    DiffusersLayerWriter,
    Pieces,
    StoredTensors,
    check_parts,
    check_single_piece,
    needs_dynamic_input,
    scalar,
    without_divisor,
)
from mezzotint.schemes import BF16, FP8, INT8, NVFP4
from mezzotint.tensor import QuantTensor

TITLE = "ModelOpt"
PRODUCER = {"name": "mezzotint", "version": VERSION}
SCALARS = {"global_scale", "input_scale"}
NUMBER_FORMATS: dict[str, dict[str, Any]] = {
    FP8.name: {"dynamic": False, "num_bits": 8, "type": "float"},
    NVFP4.name: {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
}
WEIGHT_ONLY = "W4A16_NVFP4"
UNQUANTIZED_ACTIVATIONS = "inputs stay unquantized, as the format has no scales computed per call"


class ModelOptWriter(DiffusersLayerWriter):
    name = "modelopt"
    title = "NVIDIA ModelOpt HF export"
    file = False

    def layer(self, group: Mapping[str, Pieces]) -> StoredTensors | CannotStore:
        ((module, pieces),) = group.items()
        piece, changes = without_divisor(pieces[0])
        if problem := check_single_piece(pieces, TITLE) or _check(piece):
            return problem
        tensors = {module + _suffix(piece, part): _stored(piece, part) for part in piece.parts}
        changes += (UNQUANTIZED_ACTIVATIONS,) if needs_dynamic_input(piece) else ()
        return StoredTensors(tensors, changes)

    def declare(
        self, layers: Mapping[str, Pieces], plain: Collection[str]
    ) -> Declaration | CannotStore:
        weights = {module: pieces[0] for module, pieces in layers.items()}
        quantized = [weight for weight in weights.values() if weight.scheme is not BF16]
        if not quantized:
            return (
                Declaration()
                if not weights
                else CannotStore(f"no layer is quantized, and {TITLE} declares an algorithm")
            )
        algorithm = _algorithm(quantized)
        if isinstance(algorithm, CannotStore):
            return algorithm
        transformed = {module for module, weight in weights.items() if weight.scheme is BF16}
        unquantized = {
            name.removesuffix(".weight") for name in plain if name.endswith(".weight")
        } | transformed
        entries = {
            "ignore": sorted(unquantized),
            **algorithm,
            "producer": PRODUCER,
            "quant_method": "modelopt",
        }
        return Declaration(_groups(quantized) | entries)


TARGET = ModelOptWriter()


def _suffix(piece: QuantTensor, part: str) -> str:
    return (SUFFIXES[piece.scheme.name] | OPTIONAL_SUFFIXES)[part]


def _stored(piece: QuantTensor, part: str) -> Tensor:
    """Return the part in ModelOpt's shape: [] for single numbers, [out] for INT8 scales."""
    value = piece.parts[part]
    if part in SCALARS or (part == "weight_scale" and piece.scheme is FP8):
        return scalar(value)
    return value if part != "weight_scale" or value.ndim == 1 else value.reshape(-1)


def _check(piece: QuantTensor) -> CannotStore | None:
    scheme = piece.scheme
    if scheme not in (FP8, NVFP4, INT8, BF16):
        return CannotStore(f"is {scheme.title}, and {TITLE} stores FP8, NVFP4 and INT8")
    if scheme is FP8 and piece.parts["weight_scale"].numel() != 1:
        return CannotStore(f"has one FP8 scale per row, and {TITLE} stores one per matrix")
    if scheme is INT8 and piece.parts["weight_scale"].numel() != piece.shape[0]:
        return CannotStore(f"has one INT8 scale per matrix, and {TITLE} stores one per row")
    if scheme in (FP8, INT8) and "input_scale" not in piece.parts:
        return CannotStore(
            f"has no input_scale, which {TITLE}'s {scheme.title} needs; "
            "--scales-from FILE may supply it"
        )
    return check_parts(piece, SUFFIXES[scheme.name] | OPTIONAL_SUFFIXES, TITLE)


def _algorithm(weights: Sequence[QuantTensor]) -> dict[str, Any] | CannotStore:
    """Return `quant_algo`, and `lora_rank` for weights with a low-rank part."""
    schemes = sorted({weight.scheme.title for weight in weights})
    if len(schemes) > 1:
        return CannotStore(
            f"the layers are {' and '.join(schemes)}, and {TITLE} declares one algorithm"
        )
    static = sum("input_scale" in weight.parts for weight in weights)
    if 0 < static < len(weights):
        number = len(weights) - static
        return CannotStore(
            f"{number} of {len(weights)} layers have no input_scale; "
            "--scales-from FILE may supply them"
        )
    if weights[0].scheme is not NVFP4:
        return {"quant_algo": "FP8" if weights[0].scheme is FP8 else "W8A8_SQ_PER_CHANNEL"}
    ranks = {
        weight.parts["lora_down"].shape[0] for weight in weights if "lora_down" in weight.parts
    }
    transformed = any("pre_quant_scale" in weight.parts for weight in weights)
    if (ranks or transformed) and not static:
        return CannotStore(
            f"the layers have no input_scale, which {TITLE}'s AWQ and SVD need; "
            "--scales-from FILE may supply them"
        )
    if ranks:
        return _low_rank(weights, max(ranks))
    return {"quant_algo": "NVFP4_AWQ" if transformed else "NVFP4" if static else WEIGHT_ONLY}


def _low_rank(weights: Sequence[QuantTensor], rank: int) -> dict[str, Any] | CannotStore:
    without = sum(not {"lora_down", "pre_quant_scale"} <= set(weight.parts) for weight in weights)
    if without:
        return CannotStore(
            f"{without} of {len(weights)} layers have no low-rank part, which {TITLE}'s SVD needs "
            "in every layer"
        )
    return {"quant_algo": "NVFP4_SVD", "lora_rank": rank}


def _groups(weights: Sequence[QuantTensor]) -> dict[str, Any]:
    """Return `config_groups`, which ModelOpt writes for floats, {} for integers."""
    numbers = NUMBER_FORMATS.get(weights[0].scheme.name)
    if numbers is None:
        return {}
    inputs = {"input_activations": numbers} if "input_scale" in weights[0].parts else {}
    return {"config_groups": {"group_0": {**inputs, "weights": numbers, "targets": ["Linear"]}}}
