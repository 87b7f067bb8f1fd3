"""Unquantized diffusers components: BF16, FP16 or FP32, one file or shards."""

import torch

from mezzotint.formats.calibrated import calibrated_layers
from mezzotint.formats.contents import Contents, Match, NoMatch, sort_out
from mezzotint.formats.header import Header
from mezzotint.formats.mezzotint import METHOD, quantization_config

FLOATS = {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32"}


class Plain:
    name = "plain"
    title = "unquantized (BF16, FP16 or FP32)"

    def detect(self, header: Header) -> Match | NoMatch:
        other = next((info for info in header.tensors.values() if info.dtype not in FLOATS), None)
        if other is not None:
            return NoMatch(f"{other.name} is {other.dtype}")
        if calibrated_layers(header):
            return NoMatch("ranges of a calibration stand beside the weights")
        if quantization_config(header).get("quant_method") == METHOD:
            return NoMatch(f"config.json says, by quant_method {METHOD}, that parts stand beside the weights")
        kinds = sorted({FLOATS[info.dtype] for info in header.tensors.values()})
        return Match(f"all {len(header.tensors)} tensors are {' or '.join(kinds)}")

    def contents(self, header: Header) -> Contents:
        return sort_out(header, {}, {})


FORMAT = Plain()
