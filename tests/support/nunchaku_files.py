"""Nunchaku's golden checkpoints, changed and rewritten."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.checkpoint import Checkpoint
from mezzotint.formats.writers.svdquant import (
    fuse_stored_linear,
    nunchaku_tensors,
    row_major_tensors,
)
from mezzotint.layouts.nunchaku import to_vector_fragments
from mezzotint.schemes import AWQ_W4A16

CASES = {
    "nunchaku_flux1_int4_r32": "svdq-int4_r32-flux.1-dev.safetensors",
    "nunchaku_flux1_nvfp4_r32": "svdq-fp4_r32-flux.1-dev.safetensors",
    "nunchaku_zimage_int4_r32": "svdq-int4_r32-z-image-turbo.safetensors",
}
LEGACY = "nunchaku_flux1_int4_r32/checkpoint/svdq-int4-flux.1-dev"


def golden(data: Path, case: str) -> Path:
    return data / case / "checkpoint" / CASES[case]


def changed(
    file: Path, to: Path, change: Callable[[dict[str, Tensor]], object], keep_metadata: bool = True
) -> Path:
    """A copy of a one-file checkpoint whose tensors `change` has edited in place."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, to, metadata if keep_metadata else None)
    return to


def as_nunchaku(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of a Nunchaku file with the checkpoint's weights."""
    names, tensors = checkpoint.family.nunchaku, {}
    for stored, members in names.stored_layers(checkpoint.modules).items():
        weight = fuse_stored_linear([checkpoint.read(module)[piece] for module, piece in members])
        tensors |= nunchaku_tensors(stored, weight, v1=names.v1)
    return tensors | {
        names.stored_tensor(name): checkpoint.tensor(name) for name in checkpoint.plain
    }


def as_rows(
    checkpoint: Checkpoint, file: Path, vectors_packed: bool, conversion: dict[str, str]
) -> Path:
    """Write a row-major file, with AWQ layers in BF16, and vectors in fragments if requested."""
    names, tensors = checkpoint.family.nunchaku, {}
    for stored, members in names.stored_layers(checkpoint.modules, row_major=True).items():
        weight = fuse_stored_linear([checkpoint.read(module)[piece] for module, piece in members])
        if weight.scheme is AWQ_W4A16:
            tensors |= {f"{stored}.weight": checkpoint.weight(stored).bfloat16()}
            tensors |= {f"{stored}.bias": checkpoint.bias(stored).bfloat16()}
            continue
        parts = row_major_tensors(stored, weight)
        for name in [
            n
            for n in parts
            if n.endswith((".smooth_factor", ".wcscales", ".bias")) and vectors_packed
        ]:
            parts[name] = to_vector_fragments(parts[name].unsqueeze(1)).squeeze(0)
        tensors |= parts
    tensors |= {
        names.stored_tensor(name, row_major=True): checkpoint.tensor(name)
        for name in checkpoint.plain
    }
    config = json.dumps(checkpoint.header.config)
    save_file(tensors, file, {"config": config, "conversion": json.dumps(conversion)})
    return file


def same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
