"""Fold the block scales of MXFP8 weights into their codes, for FP8 GEMMs with a scale per row.

The row's scale is its largest block scale. All are powers of two, so that their quotient moves a
code to another e4m3 number exactly, unless the result is subnormal: below 2^-6, where it is rounded
to a multiple of 2^-9. So weights change only in blocks that are far smaller than the row's largest.
"""

from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.fp8_gemm import GEMM_ALIGNMENT
from mezzotint.kernels.requirements import (
    check_requirements,
    require_known_parts,
    require_multiple_of,
    require_quantized_activation,
    require_scheme,
)
from mezzotint.schemes import FP8, MXFP8
from mezzotint.schemes.groups import replace_zero_with_one, to_groups
from mezzotint.schemes.minifloats import round_e4m3
from mezzotint.schemes.mxfp8 import MXFP8_GROUP
from mezzotint.tensor import PLAIN, QuantTensor

MAX_FOLDING_ERROR = 1e-3
"""Largest relative change of a row's blocks, on average.

Quantization to e4m3 itself changes a block by 2.6e-2.
"""


def can_fold(weight: WeightSpec, activations: str) -> Can | Cannot:
    """Return whether a weight's layer can multiply FP8 codes with a scale per row instead."""
    return check_requirements(
        require_scheme(weight, MXFP8),
        require_known_parts(weight, {"bias", "pre_quant_scale"}),
        require_quantized_activation(weight, activations, "FP8"),
        require_multiple_of(weight, GEMM_ALIGNMENT, GEMM_ALIGNMENT),
    )


def fold_block_scales(weight: QuantTensor) -> QuantTensor:
    """Return an MXFP8 weight as FP8 with a power of two per row, and with dynamic input scales.

    If a row would change by more than MAX_FOLDING_ERROR, the weight is returned as it is.
    """
    exact, scale = weight.scheme.decode(weight.parts), _row_scale(weight)
    codes = round_e4m3(exact / scale)
    # A comparison with NaN is false, so that a weight with NaN stays as it is.
    if not bool((folding_error(codes.float() * scale, exact) <= MAX_FOLDING_ERROR).all()):
        return weight
    parts = {name: part for name, part in weight.parts.items() if name != "block_scale"}
    parts |= {"codes": codes, "weight_scale": scale.squeeze(1)}
    return QuantTensor(FP8, PLAIN, weight.shape, parts, dynamic_input=True)


def _row_scale(weight: QuantTensor) -> Tensor:
    """Return the largest block scale of each row, or 1 for a row of zeros: float32 [out, 1]."""
    # The scale of a block of zeros may be anything.
    occupied = to_groups(weight.parts["codes"].float(), MXFP8_GROUP).any(dim=-1)
    scale = weight.parts["block_scale"].float().masked_fill(~occupied, 0.0)
    return replace_zero_with_one(scale.amax(dim=1, keepdim=True))


def folding_error(values: Tensor, exact: Tensor) -> Tensor:
    """Return the mean relative error of each row's blocks, float32 [out].

    Every block counts alike: in the norm of a whole row, a huge block would hide lost ones.
    """
    size = to_groups(exact, MXFP8_GROUP).norm(dim=-1)
    change = to_groups(values - exact, MXFP8_GROUP).norm(dim=-1)
    errors: Tensor = change / size.masked_fill(size == 0, 1.0)
    return errors.mean(dim=-1)
