"""Golden checkpoints and how they are opened."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mezzotint.checkpoint import Checkpoint
from mezzotint.families.building import build_meta_model
from mezzotint.loading import LoadReport, Placement, load, plan
from support.checkpoint_edits import WEIGHTS
from support.golden_files import EXACT, FLOAT, FLUX2_DEV, KLEIN

QWEN = "base/qwenimage/config.json"


@dataclass(frozen=True)
class Golden:
    """A checkpoint with its expected values; `config` is the configuration that the file lacks."""

    path: str
    expected: str
    tolerance: float = EXACT
    config: Any = None
    base: str | None = None


def of(case: str, file: str = "", expected: str = "expected", **more: Any) -> Golden:
    return Golden(f"{case}/checkpoint/{file}".rstrip("/"), f"{case}/{expected}.safetensors", **more)


CASES = [
    of("bfl_flux2dev_nvfp4", "flux2-dev-nvfp4.safetensors", config=FLUX2_DEV),
    of(
        "bfl_flux2dev_nvfp4",
        "flux2-dev-nvfp4-mixed.safetensors",
        "expected_mixed",
        config=FLUX2_DEV,
    ),
    of("bfl_flux2klein_fp8", "flux-2-klein-4b-fp8.safetensors", config=KLEIN),
    of("comfy_qwenimage_mixed_nvfp4_fp8", "qwen-image-mixed.safetensors", config=QWEN),
    of("modelopt_flux1_fp8"),
    of("modelopt_flux1_fp8", "hf"),
    of("modelopt_flux1_nvfp4"),
    Golden(
        f"modelopt_flux1_nvfp4_comfyfile/checkpoint/{WEIGHTS}",
        "modelopt_flux1_nvfp4/expected.safetensors",
    ),
    of("modelopt_flux1_nvfp4svd", tolerance=FLOAT),
    of("modelopt_wan_fp8"),
    of("modelopt_zimage_nvfp4svd", tolerance=FLOAT),
    of("nunchaku_flux1_int4_r32", "svdq-int4_r32-flux.1-dev.safetensors"),
    of("nunchaku_flux1_int4_r32", "svdq-int4-flux.1-dev"),
    of("nunchaku_flux1_nvfp4_r32", "svdq-fp4_r32-flux.1-dev.safetensors"),
    of("nunchaku_zimage_int4_r32", "svdq-int4_r32-z-image-turbo.safetensors"),
    Golden(
        "broken_nibble_swapped_comfy/checkpoint/qwen-image-mixed.safetensors",
        "comfy_qwenimage_mixed_nvfp4_fp8/expected.safetensors",
        config=QWEN,
        base="base/qwenimage",
    ),
]


def opened(data: Path, case: Golden) -> tuple[Checkpoint, dict[str, Tensor]]:
    base = None if case.base is None else data / case.base
    return Checkpoint.open(data / case.path, base=base), load_file(data / case.expected)


def loaded(
    data: Path, case: Golden, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, LoadReport]:
    """The case as a model that leaves the inputs of its layers alone."""
    checkpoint, _ = opened(data, case)
    config = (
        json.loads((data / case.config).read_text())
        if isinstance(case.config, str)
        else case.config
    )
    config = config or checkpoint.header.config
    model = build_meta_model(config["_class_name"], config)
    return model, load(
        plan(checkpoint, model, "bf16"), model, Placement(torch.device("cpu")), dtype
    )
