"""What a loaded transformer really holds: a checkpoint may say FP8 and be BF16."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from mezzotint.checkpoint import Checkpoint
from mezzotint.costs import resident_bytes
from mezzotint.formats.modelopt import quantization
from mezzotint.hub import AnyPath
from mezzotint.nn import quant_linears
from mezzotint.pipelines import transformers_of


@dataclass(frozen=True)
class Resident:
    """How the weights of a pipeline's transformers are held in memory.

    bytes             {dtype: bytes} of the transformers' parameters and buffers
    pipeline_bytes    the same of all components
    quantized_share   of the weights of all linear layers, those that are held quantized
    bits_per_weight   of all linear layers, their scales counted too
    quantized_bits    the same of those that are held quantized; of all where none is
    unit_input_scales static input scales that are exactly 1, which no calibration gives
    """

    bytes: Mapping[str, int]
    pipeline_bytes: Mapping[str, int]
    quantized_share: float
    bits_per_weight: float
    quantized_bits: float
    unit_input_scales: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def claim_of(path: AnyPath) -> str | None:
    """What the files beside a checkpoint's weights say of its quantization ("config.json: FP8"); None if nothing.

    Neither the tensors' dtypes nor their names are asked: those are what the claim is held against.
    """
    header = Checkpoint.open(path).header
    declared = quantization(header)
    if declared:
        return f"{declared['file']}: {declared.get('quant_algo') or declared.get('quant_method')}"
    note = next((key for key in header.metadata if "quantization" in key), None)
    return None if note is None else f"{note} in the file's metadata"


def resident(pipe: Any) -> Resident:
    """Count what a pipeline's transformers hold."""
    transformers = transformers_of(pipe).values()
    quantized = [layer for model in transformers for layer in quant_linears(model).values()]
    plain = [layer for model in transformers for layer in model.modules() if isinstance(layer, nn.Linear)]
    weights = sum(layer.out_features * layer.in_features for layer in quantized)
    others = sum(layer.weight.numel() for layer in plain)
    parts = [product.weight_tensor.parts for layer in quantized for product in layer.products]
    held = sum(buffer.nbytes for layer in quantized for buffer in layer.buffers())
    held_plain = sum(layer.weight.nbytes for layer in plain)
    return Resident(
        bytes=resident_bytes(transformers),
        pipeline_bytes=resident_bytes(part for part in pipe.components.values() if isinstance(part, nn.Module)),
        quantized_share=weights / (weights + others),
        bits_per_weight=8 * (held + held_plain) / (weights + others),
        quantized_bits=8 * held / weights if weights else 8 * held_plain / others,
        unit_input_scales=sum(bool((own["input_scale"] == 1).all()) for own in parts if "input_scale" in own),
    )
