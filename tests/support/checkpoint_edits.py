"""Reading, damaging and loading small checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mezzotint.checkpoint import Checkpoint
from mezzotint.families.building import build_meta_model
from mezzotint.loading import Placement, load, plan

WEIGHTS = "diffusion_pytorch_model.safetensors"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Let `change` edit the tensors of a one-file checkpoint in place; its metadata stays."""
    file = folder / WEIGHTS
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)


def edited(
    source: Path,
    target: Path,
    change: Callable[[dict[str, torch.Tensor]], Any],
    metadata: dict[str, str] | None = None,
) -> Path:
    """A copy of a file with its tensors edited; its metadata stays unless another is given."""
    with safe_open(source, framework="pt") as file:
        kept = file.metadata() if metadata is None else metadata
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, target, kept)
    return target


def load_flux(
    folder: Path, dtype: torch.dtype = torch.bfloat16, activations: str = "as_stored"
) -> torch.nn.Module:
    """The transformer in `folder`, read by Mezzotint on the CPU."""
    checkpoint = Checkpoint.open(folder)
    model = build_meta_model("FluxTransformer2DModel", checkpoint.header.config)
    load(plan(checkpoint, model, activations), model, Placement(torch.device("cpu")), dtype)
    return model.eval()


def run_flux(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """One forward of a FLUX.1 transformer on the golden inputs."""
    integral = ("img_ids", "txt_ids")
    arguments = {
        name: value if name in integral else value.to(dtype) for name, value in inputs.items()
    }
    with torch.no_grad():
        return model(**arguments, return_dict=False)[0]
