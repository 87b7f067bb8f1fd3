"""Read FP8 and INT8 weights with a scale for each block, as DeepSeek and musubi-tuner save them.

DeepSeek       X.weight e4m3 [out, in],  X.weight_scale_inv f32 [out/128, in/128], which multiplies
musubi-tuner   X.weight e4m3 or i8 [out, in],  X.scale_weight f32 or bf16 [out, in/64, 1]
others         X.weight e4m3 or i8 [out, in],  X.weight_scale f32 [out/side, in/side]

Layers without blocks may have a scale for the matrix or each row. config.json may state the blocks:
quant_method fp8 with weight_block_size. Inputs stay unquantized: the tools quantize some of them
for speed, and the files have no scale for that.
Sources: https://huggingface.co/docs/transformers/quantization/finegrained_fp8,
https://github.com/kohya-ss/musubi-tuner (modules/fp8_optimization_utils.py)
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import Len
from pydantic import PositiveInt

from mezzotint.containers import TensorInfo
from mezzotint.errors import MissingTensor
from mezzotint.formats.blocks import (
    CODES,
    Block,
    block_count,
    linear_in_blocks,
    matrix_shape,
)
from mezzotint.formats.comfy_layers import e5m2_linear
from mezzotint.formats.comfy_metadata import comfy_kitchen_linear
from mezzotint.formats.components import COMFY_METADATA
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.formats.readers.comfy import comfy_evidence
from mezzotint.formats.readers.mezzotint import quantization_config
from mezzotint.formats.scaled_fp8 import BLOCK_SCALES, scaled_in_blocks
from mezzotint.schemes import FP8, INT8
from mezzotint.untrusted.schema import Entries, validated

METHODS = ("fp8", "finegrained_fp8")


class Declared(Entries):
    """The entries of quantization_config that decide what the tensors mean."""

    weight_block_size: Annotated[list[PositiveInt], Len(2, 2)] | None = None


class BlockScales:
    name = "block_scales"
    title = "FP8 or INT8 in blocks"

    def detect(self, header: Header) -> Match | NoMatch:
        method = quantization_config(header).get("quant_method")
        if method in METHODS:
            return Match(f"config.json: quant_method {method}", certain=True)
        if method is not None or COMFY_METADATA in header.metadata or comfy_evidence(header):
            return NoMatch("the file declares another format")
        if "quantization_config" in header.metadata or header.hf_quant_config:
            return NoMatch("the file declares a quantization of another tool")
        module = next((each for each in _modules(header) if scaled_in_blocks(header, each)), None)
        if module is None:
            return NoMatch("no weight of FP8 or INT8 has a scale for each block")
        return Match(f"{module}.weight has a scale for each block", certain=True)

    def contents(self, header: Header) -> Contents:
        where = f"{header.path}: quantization_config of config.json"
        declared = validated(Declared, quantization_config(header), where).weight_block_size
        block = (declared[0], declared[1]) if declared else None
        linears = {module: _linear(header, module, block) for module in _modules(header)}
        if not linears:
            raise MissingTensor(
                f"{header.path}: config.json declares FP8 in blocks, and no layer is quantized",
                "restore the config.json that came with these weights.",
            )
        return classify_tensors(header, linears, {})


FORMAT = BlockScales()


def _modules(header: Header) -> Iterator[str]:
    """Yield the layers whose weight is codes."""
    for name, info in header.tensors.items():
        if name.endswith(".weight") and info.dtype in CODES:
            yield name.removesuffix(".weight")


def _linear(header: Header, module: str, block: Block | None) -> StoredLinear:
    scale = next((module + s for s in BLOCK_SCALES if module + s in header.tensors), None)
    if scale is None:
        raise MissingTensor(
            f"{header.path}: {module}.weight is {header.tensors[f'{module}.weight'].dtype}, and no "
            f"scale is there ({', '.join(module + suffix for suffix in BLOCK_SCALES)})",
            "a missing scale is never taken to be 1.0; export or download the file again.",
        )
    if block is not None and _fits(header, module, block, header.tensors[scale]):
        return linear_in_blocks(header, module, scale, block)
    return scaled_in_blocks(header, module) or _whole(header, module, scale)


def _fits(header: Header, module: str, block: Block, scale: TensorInfo) -> bool:
    return scale.shape == block_count(matrix_shape(header, module), block)


def _whole(header: Header, module: str, scale: str) -> StoredLinear:
    """Return a layer with a scale for the matrix or each row."""
    dtype = header.tensors[f"{module}.weight"].dtype
    if dtype is torch.float8_e5m2:
        linear = e5m2_linear(header, module)
    else:
        scheme = INT8 if dtype is torch.int8 else FP8
        linear = comfy_kitchen_linear(header, module, scheme, dynamic=False)
    return replace(linear, keys={**linear.keys, "weight_scale": scale})
