"""Quantized copies of the built-in transformer, rebuilt from its BF16 weights at first use.

NVIDIA ModelOpt (FP8, NVFP4) and comfy-kitchen (NVFP4) wrote the originals: demo_model/quantize.py.
Codes and block scales follow, bit for bit, from the BF16 weights and the scale of each matrix.
A recipe holds the rest: the header, the scales, the configuration and the SHA-256 of the file.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mezzotint.errors import BrokenFile, CannotWrite
from mezzotint.layouts.fp4 import swap_nibbles
from mezzotint.layouts.tiles import to_tiles
from mezzotint.saving.files import atomic_write, locked
from mezzotint.schemes.minifloats import pack_e2m1, round_e4m3
from mezzotint.schemes.nvfp4 import quantize_nvfp4

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMFY_MARKER = ".comfy_quant"


@dataclass(frozen=True)
class CopyRecipe:
    """What the BF16 weights do not determine.

    header   JSON header of the copy, with its padding
    config   config.json of the copy, or None if the copy is a single file
    sha256   checksum of the copy's weight file
    kept     tensors of the copy that cannot be computed, by name
    """

    header: str
    config: str | None
    sha256: str
    kept: Mapping[str, Tensor]

    @classmethod
    def read(cls, file: Path) -> "CopyRecipe":
        """Read a recipe."""
        with safe_open(file, framework="pt") as opened:
            kept = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        return cls(metadata["header"], metadata.get("config"), metadata["sha256"], kept)

    @cached_property
    def entries(self) -> dict[str, Any]:
        """Return the header's entries by tensor name, in the order of their bytes."""
        found = json.loads(self.header)
        found.pop("__metadata__", None)
        return dict(sorted(found.items(), key=lambda entry: entry[1]["data_offsets"][0]))

    def tensors(self, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield the copy's tensors in the order of their bytes.

        weights   BF16 tensors of the built-in transformer, by name
        """
        computed: dict[str, Tensor] = {}
        for layer in self.quantized_layers():
            computed |= self.quantize(layer, weights[f"{layer}.weight"])
        available = {**weights, **computed, **self.kept}
        for name in self.entries:
            yield available[name]

    def quantized_layers(self) -> list[str]:
        """Return the names of all quantized layers."""
        suffix = ".input_scale"
        return [name.removesuffix(suffix) for name in self.kept if name.endswith(suffix)]

    def quantize(self, layer: str, weight: Tensor) -> dict[str, Tensor]:
        """Return the codes and block scales of one layer under the copy's names."""
        if f"{layer}.weight_scale_2" not in self.kept:
            # ModelOpt divides in BF16 before it rounds to e4m3.
            scaled = (weight.float() / self.kept[f"{layer}.weight_scale"]).bfloat16()
            return {f"{layer}.weight": round_e4m3(scaled)}
        values, block_scale = quantize_nvfp4(weight, self.kept[f"{layer}.weight_scale_2"])
        codes = pack_e2m1(values)
        if layer + COMFY_MARKER in self.kept:
            # comfy-kitchen: even column in the high nibble, scales in cuBLASLt tiles.
            codes, block_scale = swap_nibbles(codes), to_tiles(block_scale)
        return {f"{layer}.weight": codes, f"{layer}.weight_scale": block_scale}


def cached_copy(recipe_file: Path, base: Path) -> Path:
    """Return a quantized copy in the user's cache folder, and write it there if it is missing.

    base     folder of the BF16 transformer
    Raises   CannotWrite if the cache folder is not writable
             BrokenFile if the rebuilt bytes are not those of the original
    """
    recipe = CopyRecipe.read(recipe_file)
    # The folder's name is a checksum, so that another version of the model gets another folder.
    folder = cache_folder() / recipe.sha256[:16]
    name = recipe_file.stem
    copy = folder / (name if recipe.config else f"{name}.safetensors")
    weights = copy / WEIGHTS if recipe.config else copy
    try:
        if not weights.exists():
            _write(recipe, weights, base)
    except OSError as error:
        raise CannotWrite(
            f"{weights}: could not be written: {error.strerror}",
            "set XDG_CACHE_HOME to a folder that is writable.",
        ) from error
    return copy


def cache_folder() -> Path:
    """Return the folder of rebuilt copies inside the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "mezzotint" / "builtin"


def _write(recipe: CopyRecipe, file: Path, base: Path) -> None:
    """Write a copy. The weights come last: a folder that has them is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.parent, wait=True):
        if file.exists():
            return  # another process wrote it while this one waited
        if recipe.config:
            with atomic_write(file.with_name("config.json")) as temporary:
                temporary.write_text(recipe.config)
        with atomic_write(file) as temporary:
            temporary.write_bytes(rebuild(recipe, base))


def rebuild(recipe: CopyRecipe, base: Path) -> bytes:
    """Return the bytes of the copy's weight file.

    Raises  BrokenFile if they are not those of the original
    """
    header = recipe.header.encode()
    tensors = recipe.tensors(load_file(base / WEIGHTS))
    content = b"".join(
        (
            struct.pack("<Q", len(header)),
            header,
            *(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors),
        )
    )
    if hashlib.sha256(content).hexdigest() != recipe.sha256:
        raise BrokenFile(
            f"{base}: the quantized copy rebuilt from it differs from the original",
            "reinstall mezzotint-demo.",
        )
    return content
