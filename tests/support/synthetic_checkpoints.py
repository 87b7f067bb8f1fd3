"""Write a ModelOpt NVFP4 checkpoint of FLUX.1's shapes with random values, of any size."""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mezzotint.families.building import build_meta_model
from mezzotint.formats.writers.modelopt import TARGET
from mezzotint.saving import Entry, Group, split_into_shards, weight_index
from mezzotint.saving.stream import write_shard
from mezzotint.schemes import NVFP4
from mezzotint.tensor import PLAIN, QuantTensor

STEM = "diffusion_pytorch_model"
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
QUANTIZED = ("transformer_blocks.", "single_transformer_blocks.")
BLOCK = 2**23


def write(
    folder: Path, blocks: int, single_blocks: int, heads: int = 24, shard_bytes: int = 10**10
) -> int:
    """Write the checkpoint; returns its size in bytes."""
    config = FLUX | {
        "num_layers": blocks,
        "num_single_layers": single_blocks,
        "num_attention_heads": heads,
    }
    folder.mkdir(parents=True)
    groups, layers, plain = [], {}, []
    for name, value in build_meta_model("FluxTransformer2DModel", config).state_dict().items():
        module = name.removesuffix(".weight")
        if name.startswith(QUANTIZED) and name.endswith(".weight") and value.ndim == 2:
            layers[module] = [_outline(value.shape[0], value.shape[1])]
            written = TARGET.layer({module: layers[module]}).tensors
            groups += [
                _group(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in written.items()
            ]
        else:
            plain.append(name)
            groups.append(_group(name, torch.bfloat16, tuple(value.shape)))
    shards = split_into_shards(groups, shard_bytes, "", STEM, {"format": "pt"})
    for shard in shards:
        write_shard(folder / shard.name, shard, lambda _size: None)
    if len(shards) > 1:
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(weight_index(shards, "")))
    quantization = TARGET.declare(layers, plain).quantization
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": quantization}, indent=2)
    )
    return sum(shard.nbytes for shard in shards)


def _outline(out: int, in_: int) -> QuantTensor:
    shapes = {
        "codes": (out, in_ // 2),
        "block_scale": (out, in_ // 16),
        "global_scale": (),
        "input_scale": (),
    }
    dtypes = {"codes": torch.uint8, "block_scale": torch.float8_e4m3fn}
    parts = {
        name: torch.empty(shape, dtype=dtypes.get(name, torch.float32), device="meta")
        for name, shape in shapes.items()
    }
    return QuantTensor(NVFP4, PLAIN, (out, in_), parts)


def _group(key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Group:
    entry = Entry(key, dtype, shape)
    return Group((entry,), partial(_numbers, entry))


def _numbers(entry: Entry) -> Iterator[memoryview]:
    """Random codes, block scales between 2^-1 and 2^5, small BF16 weights, and scalars of 0.01."""
    if entry.dtype == torch.float32:
        yield memoryview(np.full(entry.nbytes // 4, 0.01, np.float32).view(np.uint8).data)
        return
    random = np.random.default_rng(list(entry.key.encode()))
    for start in range(0, entry.nbytes, BLOCK):
        raw = np.frombuffer(random.bytes(min(BLOCK, entry.nbytes - start)), np.uint8).copy()
        if entry.dtype == torch.float8_e4m3fn:
            raw = raw % 0x30 + 0x30
        elif entry.dtype == torch.bfloat16:
            raw[1::2] = (raw[1::2] & 0x80) | 0x3C
        yield memoryview(raw.data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=19)
    parser.add_argument("--single-blocks", type=int, default=38)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--shard-gb", type=float, default=10.0)
    arguments = parser.parse_args()
    size = write(
        arguments.folder,
        arguments.blocks,
        arguments.single_blocks,
        arguments.heads,
        int(arguments.shard_gb * 1e9),
    )
    print(f"{arguments.folder}: {size:,} bytes")


if __name__ == "__main__":
    main()
