"""Ten faults of wrong readers or exporters, planted in an intact quantized built-in model.

A fault touches one layer, or one block, so that its place can be asked for.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.builtin import resolve
from mezzotint.generation.generate import generate
from mezzotint.generation.pipeline import load, recommended_sampling
from mezzotint.layouts.nunchaku import to_vector_fragments
from mezzotint.layouts.tiles import to_tiles
from support.checkpoint_edits import WEIGHTS, rewrite
from support.modelopt_exporter import linears, nvfp4

FP8, NVFP4, SMOOTH, BF16 = "demo-fp8", "demo-nvfp4", "smooth", "bf16"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Fault:
    """One fault: `plant` edits the tensors of a copy of `base` in place.

    module   the layer, or the block, that is wrong then; empty where all are
    """

    name: str
    base: str
    module: str
    plant: Callable[[Tensors, str], None]


def nibbles_swapped(tensors: Tensors, module: str) -> None:
    codes = tensors[f"{module}.weight"]
    tensors[f"{module}.weight"] = (codes >> 4) | (codes << 4)


def scales_tiled(tensors: Tensors, module: str) -> None:
    """Stored in 128x4 tiles, and read as rows."""
    scales = tensors[f"{module}.weight_scale"]
    rows, columns = scales.shape
    tiled = to_tiles(scales.view(torch.uint8))[:rows, :columns]
    tensors[f"{module}.weight_scale"] = tiled.contiguous().view(scales.dtype)


def input_scale_of_one(tensors: Tensors, module: str) -> None:
    tensors[f"{module}.input_scale"].fill_(1.0)


def halves_swapped(tensors: Tensors, module: str) -> None:
    """Swap halves of the output features: shift and scale of AdaLN, gate and up of an MLP."""
    for name in ("weight", "weight_scale", "bias"):
        value = tensors.get(f"{module}.{name}")
        if value is not None and value.ndim:
            raw = value.view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value
            tensors[f"{module}.{name}"] = torch.cat(raw.chunk(2)[::-1]).view(value.dtype)


def scales_doubled(tensors: Tensors, module: str) -> None:
    for name, value in tensors.items():
        if name.startswith(f"{module}.") and name.endswith(".weight_scale"):
            value *= 2


def weights_zeroed(tensors: Tensors, module: str) -> None:
    tensors[f"{module}.weight"].view(torch.uint8).zero_()


def query_and_key_exchanged(tensors: Tensors, module: str) -> None:
    for name in [name for name in tensors if name.startswith(f"{module}.to_q.")]:
        other = name.replace(".to_q.", ".to_k.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def vectors_in_fragments(tensors: Tensors, module: str) -> None:
    """The smooth vectors in Nunchaku's order, read as plain ones."""
    for name, vector in tensors.items():
        if name.startswith(f"{module}.") and name.endswith(".pre_quant_scale"):
            tensors[name] = to_vector_fragments(vector[:, None])[0].contiguous()


def nothing(_tensors: Tensors, _module: str) -> None:
    """The fault is in what config.json says."""


FAULTS = (
    Fault("nibbles swapped", NVFP4, "transformer_blocks.0.ff.net.2", nibbles_swapped),
    Fault("scales tiled", NVFP4, "transformer_blocks.0.norm1.linear", scales_tiled),
    Fault("input scale of 1", FP8, "transformer_blocks.1.attn.to_out.0", input_scale_of_one),
    Fault("AdaLN halves swapped", FP8, "norm_out.linear", halves_swapped),
    Fault("a block's scales doubled", FP8, "single_transformer_blocks.1", scales_doubled),
    Fault("weights zeroed", NVFP4, "single_transformer_blocks.1.proj_mlp", weights_zeroed),
    Fault("q and k exchanged", FP8, "transformer_blocks.0.attn", query_and_key_exchanged),
    Fault("gate and up exchanged", NVFP4, "transformer_blocks.1.ff.net.0.proj", halves_swapped),
    Fault("BF16 as FP8", BF16, "", nothing),
    Fault("smooth vectors in fragments", SMOOTH, "transformer_blocks.1", vectors_in_fragments),
)


def plant(fault: Fault, folder: Path) -> Path:
    """Write the faulty checkpoint into a new folder; returns the folder."""
    sound(fault.base, folder)
    rewrite(folder, lambda tensors: fault.plant(tensors, fault.module))
    return folder


def sound(base: str, folder: Path) -> Path:
    """Write what a fault is planted into: a copy that comes with the package, or one made here."""
    if base == SMOOTH:
        return smoothed(folder)
    shutil.copytree(resolve("demo") / "transformer" if base == BF16 else resolve(base), folder)
    if base == BF16:
        shutil.copy(resolve("demo-fp8") / "config.json", folder / "config.json")
    return folder


def smoothed(folder: Path) -> Path:
    """Write the built-in model as ModelOpt's NVFP4_AWQ: all quantized layers have a smooth vector.

    The vector is (largest weight / largest input)^1/2 of each channel, as in SmoothQuant.
    """
    tensors, config = (
        load_file(resolve("demo") / "transformer" / WEIGHTS),
        json.loads((resolve(NVFP4) / "config.json").read_text()),
    )
    for module, largest in channels().items():
        weight = tensors[f"{module}.weight"].float()
        scale = (weight.abs().amax(0).clamp_min(1e-3) / largest.clamp_min(1e-3)).sqrt().bfloat16()
        parts = nvfp4(weight / scale.float(), float((largest * scale).max()))
        tensors |= {
            f"{module}.{part}": value
            for part, value in (parts | {"pre_quant_scale": scale}).items()
        }
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    config["quantization_config"] |= {"quant_algo": "NVFP4_AWQ"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def channels() -> dict[str, Tensor]:
    """Return {layer: largest magnitude per input channel} of the blocks' layers, for two images."""
    pipe = load("demo", device="cpu")
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def look(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].float().abs().flatten(0, -2).amax(0)
            largest[name] = torch.maximum(largest.get(name, seen), seen)

        return look

    for name, module in linears(pipe.transformer).items():
        if "transformer_blocks." in name:
            module.register_forward_pre_hook(watch(name))
    prompts = [
        "a large red circle on a blue background",
        "a small black square on a white background",
    ]
    generate(pipe, prompts, sampling=recommended_sampling("demo"))
    return largest
