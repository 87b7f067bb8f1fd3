"""Resident weights of a loaded transformer: a checkpoint may claim FP8 and contain BF16."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from mezzotint.checkpoint import Checkpoint
from mezzotint.costs import resident_bytes
from mezzotint.formats.readers.modelopt import declared_quantization
from mezzotint.generation.pipeline import transformers_of
from mezzotint.hub import AnyPath
from mezzotint.nn import quant_linears


@dataclass(frozen=True)
class Resident:
    """The weights of a pipeline's transformers in memory.

    bytes              {dtype: bytes} of the transformers' parameters and buffers
    pipeline_bytes     {dtype: bytes} of the parameters and buffers of all components
    quantized_share    quantized share of the weights of all linear layers
    bits_per_weight    average over all linear layers, including scales
    quantized_bits     bits per weight of the quantized layers; of all layers if none is quantized
    unit_input_scales  number of static input scales that are exactly 1, which no calibration gives
    """

    bytes: Mapping[str, int]
    pipeline_bytes: Mapping[str, int]
    quantized_share: float
    bits_per_weight: float
    quantized_bits: float
    unit_input_scales: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantization_claim(path: AnyPath) -> str | None:
    """Return what a checkpoint's metadata claims about quantization, such as "config.json: FP8".

    Return None without a claim. Names and dtypes of tensors are not used, because the claim is
    checked against them.
    """
    header = Checkpoint.open(path).header
    declared = declared_quantization(header)
    if declared:
        return f"{declared['file']}: {declared.get('quant_algo') or declared.get('quant_method')}"
    note = next((key for key in header.metadata if "quantization" in key), None)
    return None if note is None else f"{note} in the file's metadata"


def measure_resident(pipe: DiffusionPipeline) -> Resident:
    """Measure the resident weights of a pipeline's transformers."""
    transformers = transformers_of(pipe).values()
    quantized = [layer for model in transformers for layer in quant_linears(model).values()]
    plain = [
        layer for model in transformers for layer in model.modules() if isinstance(layer, nn.Linear)
    ]
    quantized_weights = sum(layer.out_features * layer.in_features for layer in quantized)
    plain_weights = sum(layer.weight.numel() for layer in plain)
    weights = quantized_weights + plain_weights
    quantized_bytes = sum(buffer.nbytes for layer in quantized for buffer in layer.buffers())
    plain_bytes = sum(layer.weight.nbytes for layer in plain)
    parts = [sublayer.quant_weight.parts for layer in quantized for sublayer in layer.sublayers]
    bits_per_weight = 8 * (quantized_bytes + plain_bytes) / weights
    return Resident(
        bytes=resident_bytes(transformers),
        pipeline_bytes=resident_bytes(
            part for part in pipe.components.values() if isinstance(part, nn.Module)
        ),
        quantized_share=quantized_weights / weights,
        bits_per_weight=bits_per_weight,
        quantized_bits=8 * quantized_bytes / quantized_weights if quantized else bits_per_weight,
        unit_input_scales=sum(
            bool((tensors["input_scale"] == 1).all())
            for tensors in parts
            if "input_scale" in tensors
        ),
    )
