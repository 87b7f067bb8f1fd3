"""Checkpoints and models for fused activations."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.checkpoint import Checkpoint
from mezzotint.families.building import build_meta_model
from mezzotint.loading import Placement, plan
from mezzotint.loading import load as load_model
from support.flux_inputs import flux_inputs
from support.nunchaku_files import golden


def published(
    data: Path, name: str, resident: str = "stored", device: str = "cpu"
) -> tuple[Any, dict[str, Any]]:
    """Load a FLUX.1 of Nunchaku; proj_out of a single block has two pieces, with scales per row."""
    checkpoint = Checkpoint.open(golden(data, name))
    model: Any = build_meta_model("FluxTransformer2DModel", checkpoint.header.config)
    load_model(
        plan(checkpoint, model),
        model,
        Placement(torch.device(device), resident),
        torch.bfloat16,
    )
    inputs = {key: value.to(device) for key, value in flux_inputs().items()}
    wide = {
        key: inputs[key].bfloat16()
        for key in ("hidden_states", "encoder_hidden_states", "pooled_projections")
    }
    return model.eval(), inputs | wide | {"return_dict": False}


NUNCHAKU = pytest.mark.parametrize("name", ["nunchaku_flux1_int4_r32", "nunchaku_flux1_nvfp4_r32"])
