"""Code shared by the backends for NVFP4 GEMM on Blackwell."""

import torch
from torch import Tensor

from mezzotint.kernels.backend import WeightSpec
from mezzotint.kernels.requirements import (
    require_gpu,
    require_multiple_of,
    require_quantized_activation,
    require_scheme,
)
from mezzotint.kernels.target import Target
from mezzotint.schemes import NVFP4, SVDQUANT_NVFP4
from mezzotint.schemes import nvfp4 as scheme
from mezzotint.tensor import Layout, QuantTensor

SCHEMES = (NVFP4, SVDQUANT_NVFP4)
BLOCKED_SCALES = Layout(scales="tiles_128x4")
"""Layout that the kernels read: low nibble first, scales in NVIDIA's 128x4 blocked order."""


def nvfp4_requirements(
    weight: WeightSpec, target: Target, activations: str, out_multiple: int, in_multiple: int
) -> tuple[str | None, ...]:
    """Return the unmet requirements of an NVFP4 kernel.

    out_multiple, in_multiple   what output and input features must be multiples of
    """
    return (
        require_scheme(weight, *SCHEMES),
        require_gpu(target, "FP4 tensor cores (sm_100 or newer)", lambda gpu: gpu >= (10, 0)),
        require_quantized_activation(weight, activations, "NVFP4"),
        require_multiple_of(weight, out_multiple, in_multiple),
    )


def split_outer_scale(weight: QuantTensor) -> dict[str, Tensor]:
    """Split the outer scale of the weight between the kernel and `apply_epilogue`.

    Kernels take one number per matrix. Fused layers have one scale per row.

    Returns   alpha, float32 [], for the kernel; row_factor, float32 [out], if scales are per row
    """
    parts = weight.parts
    outer = torch.ones(1, dtype=torch.float32, device=parts["codes"].device)
    for name in ("global_scale", "channel_scale"):
        if name in parts:
            outer = outer * parts[name].float().reshape(-1)
    if outer.numel() == 1:
        return {"alpha": outer.reshape(())}
    return {"alpha": torch.ones_like(outer[0]), "row_factor": outer}


def activation_global_scale(z: Tensor, weight: QuantTensor) -> Tensor:
    """Return the global scale of the quantized input, float32 []; 1 for SVDQuant, without one."""
    # Nunchaku's kernels store the block scales of inputs as e4m3 without a second scale.
    if weight.scheme is SVDQUANT_NVFP4:
        return torch.ones((), dtype=torch.float32, device=z.device)
    return scheme.input_unit(z, weight.parts)
