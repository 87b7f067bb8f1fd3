"""Whether 4-bit and MXFP8 weights stay as stored in memory, or become FP8 when they are loaded."""

import math
from collections.abc import Sequence

import torch

from mezzotint.kernels import (
    QUANTIZED_ACTIVATIONS,
    BackendChoice,
    Can,
    Target,
    WeightSpec,
    backend_for_scheme,
    select,
)
from mezzotint.kernels.backends.dequant_fp8 import BACKEND as DEQUANT_FP8
from mezzotint.kernels.backends.dequant_fp8 import can_dequant_fp8
from mezzotint.kernels.fp8_folding import can_fold, fold_block_scales
from mezzotint.kernels.fp8_weight import to_fp8
from mezzotint.kernels.requirements import require_fp8_gpu
from mezzotint.loading.placement import AS_STORED_BITS, FP8, RESIDENCY_MODES, Placement
from mezzotint.tensor import QuantTensor

__all__ = ["AS_STORED_BITS", "FP8", "RESIDENCY_MODES", "choose_residency", "to_residency"]

MAX_MEMORY_SHARE = 0.5
"""Largest share of free memory that FP8 weights may take when nothing is requested.

The rest is for text encoders, the VAE and activations."""


def choose_residency(
    placement: Placement,
    weights: Sequence[WeightSpec],
    other_bytes: int,
    activations: str,
    backend: BackendChoice = None,
) -> str:
    """Return the requested residency, or FP8 if each call would convert to FP8 anyway and it fits.

    weights       the quantized layers
    other_bytes   bytes of everything that is not in `weights`
    backend       the backend that was requested
    """
    device = placement.device
    if placement.residency is not None:
        return placement.residency
    target = Target.of(device)
    if require_fp8_gpu(target) is not None:
        return AS_STORED_BITS
    requested = [backend_for_scheme(backend, weight.scheme) for weight in weights]
    pairs = list(zip(weights, requested, strict=True))
    selected = [select(weight, target, activations, name).backend for weight, name in pairs]
    if DEQUANT_FP8 in selected:
        needed = other_bytes + sum(math.prod(weight.shape) for weight in weights)
        free, _ = torch.accelerator.get_memory_info(device)
        return FP8 if needed <= MAX_MEMORY_SHARE * free else AS_STORED_BITS
    # MXFP8 codes have 8 bits too, so that FP8 takes no more memory.
    foldable = [
        isinstance(can_fold(weight, activations), Can) for weight, name in pairs if not name
    ]
    return FP8 if any(foldable) else AS_STORED_BITS


def to_residency(
    weight: QuantTensor, residency: str, activations: str = QUANTIZED_ACTIVATIONS
) -> QuantTensor:
    """Return the weight as it stays in memory; one without an FP8 form stays as it is."""
    if residency != FP8:
        return weight
    spec = WeightSpec.of(weight)
    if isinstance(can_fold(spec, activations), Can):
        return fold_block_scales(weight)
    return to_fp8(weight) if isinstance(can_dequant_fp8(spec, activations), Can) else weight
