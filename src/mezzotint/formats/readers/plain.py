"""Read unquantized diffusers components: BF16, FP16 or FP32, one file or shards."""

from collections.abc import Mapping

import torch

from mezzotint.containers import DType
from mezzotint.formats.contents import Contents, Match, NoMatch, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.formats.readers.mezzotint import METHOD, quantization_config
from mezzotint.formats.readers.modelopt_calibration import calibrated_layers

FLOATS: Mapping[DType, str] = {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32"}


class Plain:
    name = "plain"
    title = "unquantized (BF16, FP16 or FP32)"

    def detect(self, header: Header) -> Match | NoMatch:
        quantized = next(
            (info for info in header.tensors.values() if info.dtype not in FLOATS), None
        )
        if quantized is not None:
            return NoMatch(f"{quantized.name} is {quantized.dtype}")
        if calibrated_layers(header):
            return NoMatch("the weights have ranges of a calibration")
        if quantization_config(header).get("quant_method") == METHOD:
            return NoMatch(f"config.json declares quantized layers (quant_method {METHOD})")
        kinds = sorted({FLOATS[info.dtype] for info in header.tensors.values()})
        return Match(f"all {len(header.tensors)} tensors are {' or '.join(kinds)}")

    def contents(self, header: Header) -> Contents:
        return classify_tensors(header, {}, {})


FORMAT = Plain()
