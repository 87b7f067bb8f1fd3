"""What the backends that multiply NVFP4 by NVFP4 on Blackwell's tensor cores have in common."""

import torch
from torch import Tensor

from mezzotint.kernels.backend import Target, WeightSpec
from mezzotint.kernels.refusals import exact_input, odd_sides, other_gpu, other_scheme
from mezzotint.schemes import NVFP4, SVDQUANT_NVFP4
from mezzotint.schemes import nvfp4 as scheme
from mezzotint.tensor import Layout, QuantTensor

SCHEMES = (NVFP4, SVDQUANT_NVFP4)
TILED = Layout(scales="tiles_128x4")
"""What the kernels read: codes low nibble first, scales in NVIDIA's blocked order."""


def reasons_against(
    weight: WeightSpec, target: Target, activations: str, rows: int, columns: int
) -> tuple[str | None, ...]:
    """rows, columns   what the kernel needs the output and the input features to be multiples of"""
    return (
        other_scheme(weight, *SCHEMES),
        other_gpu(target, "FP4 tensor cores (sm_100 or newer)", lambda own: own >= (10, 0)),
        exact_input(weight, activations, "NVFP4"),
        odd_sides(weight, rows, columns),
    )


def outer_scale(weight: QuantTensor) -> dict[str, Tensor]:
    """What multiplies the product besides the blocks' scales, split into what kernels take and what `around` applies.

    Returns   alpha, float32 [], for the whole matrix; row_factor, float32 [out], where rows have scales of their own
    """
    parts = weight.parts
    total = torch.ones(1, dtype=torch.float32, device=parts["codes"].device)
    for name in ("global_scale", "channel_scale"):
        if name in parts:
            total = total * parts[name].float().reshape(-1)
    if total.numel() == 1:
        return {"alpha": total.reshape(())}
    return {"alpha": torch.ones_like(total[0]), "row_factor": total}


def input_unit(z: Tensor, weight: QuantTensor) -> Tensor:
    """The scale above the block scales of the rounded input, float32 []; SVDQuant has none, which is 1."""
    if weight.scheme is SVDQUANT_NVFP4:
        return torch.ones((), dtype=torch.float32, device=z.device)
    return scheme.input_unit(z, weight.parts)
