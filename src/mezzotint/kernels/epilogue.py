"""The operations around the GEMM with the codes: smoothing, row scales, low-rank branch, bias.

The formula is in `mezzotint.schemes.scheme`. The low-rank branch runs in the dtype of the input.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.schemes.scheme import Parts, transform_activation
from mezzotint.tensor import QuantTensor

Gemm = Callable[[Tensor, Tensor | None], Tensor]
"""(z [rows, in], bias [out] or None) -> [rows, out], in z's dtype."""


def apply_epilogue(x: Tensor, weight: QuantTensor, bias: Tensor | None, gemm: Gemm) -> Tensor:
    """Run a linear layer whose GEMM is `gemm`: x [..., in] to [..., out] in x's dtype."""
    x2d = x.reshape(-1, weight.shape[1])
    transformed = _transform(x2d, weight.parts)
    bias = None if bias is None else bias.to(x.dtype)
    y = _scaled_gemm(gemm, transformed, weight.prepared.get("row_factor"), bias)
    y = _add_low_rank(y, x2d, transformed, weight.parts)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _transform(x: Tensor, parts: Parts) -> Tensor:
    """Apply shift, smoothing and rotation in float32, if the layer has any."""
    if not {"shift", "smooth", "pre_quant_scale", "rotation"} & set(parts):
        return x
    # The kernels read x's dtype. Rounding to it moves some inputs to the next code, see
    # docs/numerics.md; smoothing in that dtype would round once more.
    return transform_activation(x, parts).to(x.dtype)


def _scaled_gemm(gemm: Gemm, z: Tensor, row_factor: Tensor | None, bias: Tensor | None) -> Tensor:
    """Run the GEMM; a row factor [out] scales its output before the bias is added."""
    if row_factor is None:
        return gemm(z, bias)
    # The bias is in units of the output, so the GEMM cannot add it before the factor.
    y = (gemm(z, None) * row_factor).to(z.dtype)
    return y if bias is None else y + bias


def _add_low_rank(y: Tensor, x: Tensor, transformed: Tensor, parts: Parts) -> Tensor:
    """Add the low-rank branch: ModelOpt's reads the transformed input, Nunchaku's the original."""
    for branch, branch_input in (("lora", transformed), ("proj", x)):
        if f"{branch}_down" in parts:
            down = F.linear(branch_input, parts[f"{branch}_down"].to(x.dtype))
            y = torch.addmm(y, down, parts[f"{branch}_up"].to(x.dtype).t())
    return y
