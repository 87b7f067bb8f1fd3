"""Full-size checkpoints that need no disk space: real headers, and sparse files for the data."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mezzotint.containers.gguf_types import BLOCKS
from mezzotint.containers.safetensors import DTYPES
from mezzotint.formats import read_header, targets
from mezzotint.formats.comfy_metadata import MARKER
from mezzotint.saving import Entry
from mezzotint.saving.gguf_file import GGUFFile, GGUFGroup
from mezzotint.schemes import INT8, NVFP4
from mezzotint.schemes.rotation import regular_hadamard
from mezzotint.tensor import PLAIN, QuantTensor
from support.header_fixtures import expand, read_fixture
from support.nunchaku_files import CASES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
Q8_0 = next(block for block in BLOCKS.values() if block.name == "Q8_0")
RANK = 32
SCALE = torch.tensor(0.01)
SHARD_BYTES = 10 * 10**9
Tensors = dict[str, Tensor]
"""{name: tensor}: one on the meta device is a hole, one on the CPU is written."""


def write(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """The tensors as a component folder of shards of 10 GB."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[Tensors] = [{}]
    for name, tensor in tensors.items():
        if sum(stored.nbytes for stored in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, dict(metadata or {}))
    index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def _write_file(file: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        offsets = [position, end]
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        position = end
    text = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            if not tensor.is_meta:
                stream.seek(8 + len(text) + entries[name]["data_offsets"][0])
                stream.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        stream.truncate(8 + len(text) + position)


def full_size(model: str, form: str) -> Tensors:
    """A model's unquantized tensors, in diffusers' or its makers' names."""
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in expand(read_fixture(model)[form]).items()
    }


def nvfp4(tensors: Tensors, target: str) -> tuple[Tensors, dict[str, Any], dict[str, str]]:
    """Return tensors with NVFP4 blocks as a target of `convert` stores them, config, metadata."""
    return quantized(tensors, target, _outline)


def quantized(
    tensors: Tensors, target: str, outline: Callable[[int, int], QuantTensor]
) -> tuple[Tensors, dict[str, Any], dict[str, str]]:
    """Return what `nvfp4` does, for the scheme of `outline`."""
    writer, written, layers = targets()[target], {}, {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if (
            module != name
            and "blocks" in name
            and tensor.ndim == 2
            and all(side % 16 == 0 for side in tensor.shape)
        ):
            layers[module] = [outline(*tensor.shape)]
            parts = writer.layer({module: layers[module]}).tensors
            written |= {key: part if part.ndim else SCALE for key, part in parts.items()}
        else:
            written[name] = tensor
    declaration = writer.declare(layers, written.keys() - layers.keys())
    config = (
        {}
        if declaration.quantization is None
        else {"quantization_config": declaration.quantization}
    )
    return written, config, dict(declaration.metadata)


def _outline(out: int, in_: int) -> QuantTensor:
    parts = {
        "codes": torch.empty(out, in_ // 2, dtype=torch.uint8, device="meta"),
        "block_scale": torch.empty(out, in_ // 16, dtype=torch.float8_e4m3fn, device="meta"),
        "global_scale": torch.empty((), device="meta"),
        "input_scale": torch.empty((), device="meta"),
    }
    return QuantTensor(NVFP4, PLAIN, (out, in_), parts)


def _convrot_outline(out: int, in_: int) -> QuantTensor:
    parts = {
        "codes": torch.empty(out, in_, dtype=torch.int8, device="meta"),
        "weight_scale": torch.empty(out, 1, device="meta"),
        "rotation": regular_hadamard(256),
    }
    return QuantTensor(INT8, PLAIN, (out, in_), parts, dynamic_input=True)


def nunchaku(golden: Path, times: int, blocks: int) -> tuple[Tensors, dict[str, str]]:
    """Return a golden file's SVDQuant layers, `times` as wide, in `blocks` blocks of each kind."""
    tensors: Tensors = {}
    infos = read_header(golden).tensors
    modules = {
        key.removesuffix(".qweight") for key, info in infos.items() if info.dtype is torch.int8
    }
    for key, info in infos.items():
        wide = key.rpartition(".")[0] in modules
        shape = [side * times if wide and side != RANK else side for side in info.shape]
        for block in range(blocks):
            tensors[key.replace("blocks.0.", f"blocks.{block}.")] = torch.empty(
                shape, dtype=info.dtype, device="meta"
            )
    with safe_open(golden, framework="pt") as file:
        return tensors, file.metadata()


def _of_writer(model: str, form: str, target: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, _data: Path) -> Path:
        tensors, config, metadata = nvfp4(full_size(model, form), target)
        return write(folder, tensors, read_fixture(model)["config"] | config, metadata)

    return make


def _plain(folder: Path, _data: Path) -> Path:
    return write(folder, full_size("flux2-dev", "diffusers"), read_fixture("flux2-dev")["config"])


def _bfl(folder: Path, _data: Path) -> Path:
    tensors, _, _ = nvfp4(full_size("flux2-dev", "original"), "comfy")
    return write(
        folder, {name: value for name, value in tensors.items() if not name.endswith(MARKER)}, {}
    )


def _comfy_markers(folder: Path, _data: Path) -> Path:
    tensors, _, _ = nvfp4(full_size("qwen-image", "diffusers"), "comfy")
    return write(folder, tensors, read_fixture("qwen-image")["config"])


def _convrot(folder: Path, _data: Path) -> Path:
    tensors, _, metadata = quantized(
        full_size("qwen-image", "diffusers"), "comfy", _convrot_outline
    )
    return write(folder, tensors, read_fixture("qwen-image")["config"], metadata)


def _gguf(folder: Path, _data: Path) -> Path:
    """FLUX.1 in Q8_0, in one file, as ComfyUI-GGUF leaves it: other tensors are F32 or BF16."""
    groups = []
    for name, tensor in full_size("flux1-dev", "original").items():
        matrix = "blocks." in name and name.endswith(".weight") and tensor.ndim == 2
        plain = torch.float32 if tensor.ndim == 1 else torch.bfloat16
        shape, dtype = tuple(tensor.shape), Q8_0 if matrix else plain
        stored = Q8_0.packed_shape(shape) if matrix else shape
        entry = Entry(name, torch.uint8 if matrix else plain, stored)
        groups.append(GGUFGroup((entry,), lambda: iter(()), dtype=dtype, shape=shape))
    file = GGUFFile("flux1-dev-Q8_0.gguf", tuple(groups), values={"general.architecture": "flux"})
    folder.mkdir(parents=True)
    with (folder / file.name).open("wb") as stream:
        stream.write(file.header())
        stream.truncate(file.nbytes)
    return folder


def _nunchaku(metadata: Mapping[str, str] | None) -> Callable[[Path, Path], Path]:
    def make(folder: Path, data: Path) -> Path:
        case = "nunchaku_flux1_int4_r32"
        tensors, declared = nunchaku(data / case / "checkpoint" / CASES[case], 24, 38)
        return write(folder, tensors, {}, declared if metadata is None else metadata)

    return make


WIDENED = ("nunchaku", "nunchaku undeclared", "row-major")
"""Files of a tiny model's layers, widened; the other tensors stay small, so no model fits."""
FORMATS: dict[str, Callable[[Path, Path], Path]] = {
    "plain": _plain,
    "modelopt": _of_writer("flux2-dev", "diffusers", "modelopt"),
    "mezzotint": _of_writer("flux2-dev", "diffusers", "mezzotint"),
    "comfy": _of_writer("qwen-image", "diffusers", "comfy"),
    "comfy by markers": _comfy_markers,
    "comfy convrot": _convrot,
    "bfl": _bfl,
    "gguf": _gguf,
    "nunchaku": _nunchaku(None),
    "nunchaku undeclared": _nunchaku({}),
    "row-major": _nunchaku({"conversion": '{"layout": "row_major"}'}),
}
"""{what is made: (folder, folder of the golden files) -> the folder, filled}"""
