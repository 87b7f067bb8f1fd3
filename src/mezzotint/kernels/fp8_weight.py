"""The FP8 form of a layer's weight, for callers that quantize the activation themselves."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mezzotint.kernels.ops.code_kinds import code_kind
from mezzotint.kernels.ops.dequant_fp8.reference import (
    dequant_fp8_reference,
    has_static_input,
    low_rank_factors,
    prepare_scales,
)
from mezzotint.schemes import FP8
from mezzotint.schemes.minifloats import E2M1_MAX
from mezzotint.tensor import PLAIN, QuantTensor

FP8_BACKENDS = {"scaled_mm", "dequant_fp8"}
"""Backends that multiply by such a weight."""


class FP8Weight(NamedTuple):
    """An FP8 weight: codes e4m3 [out, in]; weight_scale float32 [1] or [out]; bias [out] or None"""

    codes: Tensor
    weight_scale: Tensor
    bias: Tensor | None


def has_fp8_weight(weight: QuantTensor, backend: str) -> bool:
    """Return whether the backend multiplies the quantized input by an FP8 weight.

    The input must need no other transform before it is quantized.
    """
    # Elsewhere `prepare_scales` merges pre_quant_scale into the columns of the matrix.
    scaled_first = weight.scheme is FP8 or has_static_input(weight.parts)
    return backend in FP8_BACKENDS and not (scaled_first and "pre_quant_scale" in weight.parts)


def get_fp8_weight(weight: QuantTensor, bias: Tensor | None) -> FP8Weight:
    """Return the FP8 weight; 4-bit weights are dequantized to FP8 first."""
    if weight.scheme is FP8:
        scale = weight.parts["weight_scale"].float().reshape(-1)
        return FP8Weight(weight.parts["codes"], scale, bias)
    return FP8Weight(dequant_fp8(weight), fp8_weight_scale(weight), bias_with_shift(weight, bias))


def static_activation_scale(weight: QuantTensor) -> Tensor | None:
    """Return the static scale of an FP8 input, float32 [1]; None if the scale is per row."""
    scale = weight.parts.get("input_scale") if weight.scheme is FP8 else fp8_input_scale(weight)
    return None if scale is None else scale.float().reshape(1)


def dequant_fp8(weight: QuantTensor) -> Tensor:
    """Compute `dequant_fp8_reference` with the kernel that `prepare` imported."""
    parts, prepared = weight.parts, weight.prepared
    up, down = low_rank_factors(parts) or (None, None)
    codes: Tensor = torch.ops.mezzotint.dequant_fp8(
        parts["codes"],
        parts["block_scale"],
        prepared["factor"],
        prepared["scale"],
        prepared.get("column"),
        up,
        down,
        code_kind(weight.scheme),
        weight.scheme.group,
        "lora_down" in parts,
    )
    return codes


def to_fp8(weight: QuantTensor) -> QuantTensor:
    """Convert a 4-bit weight to FP8 permanently.

    A static input scale, and the pre_quant_scale that it was calibrated with, remain parts.
    """
    prepared = replace(weight, prepared=prepare_scales(weight))
    parts = {"codes": dequant_fp8_reference(prepared), "weight_scale": fp8_weight_scale(prepared)}
    bias = bias_with_shift(prepared, weight.parts.get("bias"))
    if bias is not None:
        parts["bias"] = bias
    static = fp8_input_scale(weight)
    if static is not None:
        parts["input_scale"] = static
        if "pre_quant_scale" in weight.parts:
            parts["pre_quant_scale"] = weight.parts["pre_quant_scale"]
    return QuantTensor(FP8, PLAIN, weight.shape, parts, weight.dynamic_input or static is None)


def fp8_input_scale(weight: QuantTensor) -> Tensor | None:
    """Return the FP8 input scale, amax / 448, for an NVFP4 input scale of amax / (6 * 448)."""
    return weight.parts["input_scale"] * E2M1_MAX if has_static_input(weight.parts) else None


def fp8_weight_scale(weight: QuantTensor) -> Tensor:
    """Return the scale of a prepared weight's FP8 codes, float32.

    It is [1] with a static input scale, otherwise [out].
    """
    # With a static input scale, `prepare_scales` gives every row the same scale.
    scale = weight.prepared["scale"]
    return scale[:1] if has_static_input(weight.parts) else scale


def bias_with_shift(weight: QuantTensor, bias: Tensor | None) -> Tensor | None:
    """Return the bias plus the contribution of a shifted input.

    The result is float32 if the layer has no bias of its own.
    """
    shift_bias = weight.prepared.get("bias")
    if bias is None or shift_bias is None:
        return shift_bias if bias is None else bias
    return (bias.float() + shift_bias).to(bias.dtype)
