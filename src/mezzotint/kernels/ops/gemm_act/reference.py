"""Define the GEMM of 8-bit codes with a fused activation; the kernel must match it."""

import torch
from torch import Tensor

from mezzotint.kernels.ops.quantize_activation.reference import apply_activation
from mezzotint.schemes.minifloats import round_e4m3

FUSED_ACTIVATIONS = ("none", "gelu", "swiglu")
"""Their index is the value of ACTIVATION in kernel.cu."""


def gemm_act_reference(
    x: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    weight_scale: Tensor,
    inverse_scale: Tensor | None,
    activation: str,
    plain_columns: int,
    reserved: int,
) -> tuple[Tensor, Tensor]:
    """Compute y = x @ codes.T * input_scale * weight_scale + bias.

    Return the first columns of y, and e4m3(activation(other columns) * inverse_scale).

    x, codes        e4m3 or int8 [m, k], [n, k]
    bias            bf16 [n] or None
    input_scale     float32, one element or [m, 1]
    weight_scale    float32, one element or [n]
    inverse_scale   float32, one element: 1 / input_scale of the next layer; None without activation
    activation      "none" (all columns are plain), "gelu", or "swiglu": silu(a) * b for [a, b];
                    int8 has "none" only
    plain_columns   number of columns without activation
    reserved        columns left uninitialized before the quantized ones, for `quantize_into`
    Returns         bf16 [m, plain_columns]; e4m3 [m, reserved + active columns]
    """
    y = exact_sums(x, codes) * (input_scale.reshape(-1, 1) * weight_scale.reshape(1, -1))
    y = y if bias is None else y + bias.float()
    out, quantized = allocate_outputs(x, codes, activation, plain_columns, reserved)
    out.copy_(y[:, :plain_columns])
    if inverse_scale is not None:
        active = apply_activation(y[:, plain_columns:], activation)
        quantized[:, reserved:] = round_e4m3(active * inverse_scale)
    return out, quantized


def allocate_outputs(
    x: Tensor, codes: Tensor, activation: str, plain_columns: int, reserved: int
) -> tuple[Tensor, Tensor]:
    """Return uninitialized outputs of the shapes that `gemm_act_reference` describes."""
    # `x.new_empty` keeps the dtype. The prefix shares the tensor with the active columns, because
    # the next GEMM reads both as one input; a separate prefix would have to be copied.
    active = (codes.shape[0] - plain_columns) // (2 if activation == "swiglu" else 1)
    width = 0 if activation == "none" else reserved + active
    return x.new_empty(x.shape[0], plain_columns, dtype=torch.bfloat16), x.new_empty(
        x.shape[0], width
    )


def exact_sums(x: Tensor, codes: Tensor) -> Tensor:
    """Compute x @ codes.T in float32; sums of int8 products are exact before they are rounded.

    x, codes   e4m3 or int8 [m, k], [n, k]
    """
    if x.dtype == torch.int8:  # float32 holds integers up to 2^24 only
        return (x.double() @ codes.double().t()).float()
    return x.float() @ codes.float().t()
