"""Whether 4-bit weights stay 4 bits in memory, or become FP8 when they are loaded."""

import math
from collections.abc import Sequence

import torch

from mezzotint.errors import BadRequest, there_are
from mezzotint.kernels import AS_STORED, BackendChoice, Can, Target, WeightSpec, asked_for, select
from mezzotint.kernels.expand import BACKEND as EXPAND
from mezzotint.kernels.expand import as_fp8, can_expand
from mezzotint.tensor import QuantTensor

STORED, FP8 = "stored", "fp8"
RESIDENT = (STORED, FP8)
SHARE = 0.5
"""Weights become FP8 by themselves where they then take at most this share of the memory that is free; the rest is for
text encoders, the VAE and what runs through."""


def settle(
    asked: str | None,
    weights: Sequence[WeightSpec],
    other_bytes: int,
    device: torch.device,
    activations: str,
    backend: BackendChoice = None,
) -> str:
    """What is asked for; or else FP8 where weights would be expanded to FP8 for every product and there is room.

    asked         "stored", "fp8", or None
    other_bytes   of everything that is not in `weights`
    backend       what was asked for to multiply by them
    Raises        BadRequest
    """
    if asked is not None:
        if asked not in RESIDENT:
            raise BadRequest(f"resident is {asked!r}", there_are(asked, RESIDENT))
        return asked
    target = Target.of(device)
    if target.kind != "cuda":
        return STORED
    chosen = [select(weight, target, activations, asked_for(backend, weight.scheme)).backend for weight in weights]
    if EXPAND not in chosen:
        return STORED
    needed = other_bytes + sum(math.prod(weight.shape) for weight in weights)
    free, _ = torch.accelerator.get_memory_info(device)
    return FP8 if needed <= SHARE * free else STORED


def resident_form(weight: QuantTensor, resident: str, activations: str = AS_STORED) -> QuantTensor:
    """The weight as it is to stay in memory; one that has no FP8 form, or is FP8 already, stays what it is."""
    if resident == FP8 and isinstance(can_expand(WeightSpec.of(weight), activations), Can):
        return as_fp8(weight)
    return weight
