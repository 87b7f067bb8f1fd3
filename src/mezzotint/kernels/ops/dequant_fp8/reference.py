"""Define the FP8 form of a 4-bit weight; the kernel must match it.

The FP8 matrix multiplies the layer's input directly. So it merges the codes, their scales, the
low-rank branch and the smoothing of the input:

    e4m3(((code * block_scale * factor + lora / scale) * column) + proj / scale)

`lora` and `proj` are the products of the two low-rank branches, see `mezzotint.schemes.scheme`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mezzotint.schemes import SVDQUANT_INT4
from mezzotint.schemes.minifloats import E4M3_MAX, round_e4m3, unpack_e2m1, unpack_nibbles
from mezzotint.schemes.scheme import Parts
from mezzotint.tensor import QuantTensor


def dequant_fp8_reference(weight: QuantTensor) -> Tensor:
    """Return the FP8 codes of a prepared weight, e4m3 [out, in].

    Each code times its row's `scale` is the FP8 number nearest to the dequantized weight. With a
    static input scale the smoothing is not merged, because the scale was calibrated after it.
    """
    prepared = weight.prepared
    return round_e4m3(
        _scaled_weight(weight, prepared["factor"], prepared["scale"], prepared.get("column"))
    )


def prepare_scales(weight: QuantTensor) -> dict[str, Tensor]:
    """Return the vectors that `dequant_fp8_reference` and the kernel read, all float32.

    scale    [out], the FP8 scale of each row: amax / 448
    factor   [out], multiplies code * block_scale; already divided by `scale`
    column   [in], the smoothing of the input, if the layer has one
    bias     [out], the contribution of a shifted input, if the layer has a shift
    """
    outer, column = _outer_scale(weight.parts, weight.shape[0]), _input_channel_scale(weight.parts)
    scale = _row_scale(weight, outer, column)
    prepared = {"scale": scale, "factor": outer / scale}
    if column is not None:
        prepared["column"] = column
    if "shift" in weight.parts:
        prepared["bias"] = _shift_bias(weight, column)
    return prepared


def has_static_input(parts: Mapping[str, object]) -> bool:
    """Return whether the layer has a static input scale."""
    return "input_scale" in parts


def low_rank_factors(parts: Parts) -> tuple[Tensor, Tensor] | None:
    """Return the low-rank factors (up, down), or None."""
    for branch in ("lora", "proj"):
        if f"{branch}_down" in parts:
            return parts[f"{branch}_up"], parts[f"{branch}_down"]
    return None


def _row_scale(weight: QuantTensor, outer: Tensor, column: Tensor | None) -> Tensor:
    ones = torch.ones_like(outer)
    scale = _scaled_weight(weight, outer, ones, column).abs().amax(1) / E4M3_MAX
    if has_static_input(weight.parts):
        # One scale for the matrix: cuBLASLt applies row scales to both operands or to neither,
        # and a static input scale is a single number.
        scale = scale.amax().expand_as(scale)
    return torch.where(scale > 0, scale, ones)  # a row of zeros stays zero with any scale


def _shift_bias(weight: QuantTensor, column: Tensor | None) -> Tensor:
    """Return what the shift of the input adds to the output, float32 [out]."""
    codes = weight.scheme.decode(weight.parts)
    rows = (codes if column is None else codes * column).sum(1)
    return rows * weight.parts["shift"].float()


def _outer_scale(parts: Parts, out_features: int) -> Tensor:
    """Return the factor of each row besides its block scales, float32 [out]."""
    outer = torch.ones(out_features, dtype=torch.float32, device=parts["codes"].device)
    for name in ("global_scale", "channel_scale"):
        if name in parts:
            outer = outer * parts[name].float().reshape(-1)
    return outer


def _input_channel_scale(parts: Parts) -> Tensor | None:
    """Return the smoothing that is merged into the columns, float32 [in], or None."""
    if has_static_input(parts) or not {"pre_quant_scale", "smooth"} & set(parts):
        return None
    factor = torch.ones_like(
        parts["smooth" if "smooth" in parts else "pre_quant_scale"], dtype=torch.float32
    )
    if "pre_quant_scale" in parts:
        factor = factor * parts["pre_quant_scale"].float()
    return factor / parts["smooth"].float() if "smooth" in parts else factor


def _scaled_weight(
    weight: QuantTensor, factor: Tensor, scale: Tensor, column: Tensor | None
) -> Tensor:
    """Return the matrix before FP8 quantization, in units of each row's `scale`.

    The result is float32 [out, in]. The order of operations is the kernel's order, so that both
    round alike.
    """
    values = _block_scaled_codes(weight) * factor[:, None]
    low_rank = _low_rank_weight(weight.parts, scale)
    if low_rank is not None and "lora_down" in weight.parts:
        values = values + low_rank  # this branch reads the smoothed input
    if column is not None:
        values = values * column
    if low_rank is not None and "lora_down" not in weight.parts:
        values = values + low_rank  # this branch reads the layer's own input
    return values


def _block_scaled_codes(weight: QuantTensor) -> Tensor:
    parts, group = weight.parts, weight.scheme.group
    if weight.scheme is SVDQUANT_INT4:
        # Two's complement in four bits: flipping the sign bit and subtracting 8 extends the sign.
        values = ((unpack_nibbles(parts["codes"]) ^ 8).to(torch.int16) - 8).float()
    else:
        values = unpack_e2m1(parts["codes"])
    values = values.reshape(len(values), -1, group) * parts["block_scale"].float().unsqueeze(-1)
    return values.flatten(-2)


def _low_rank_weight(parts: Parts, scale: Tensor) -> Tensor | None:
    """Return up @ down in units of `scale`, rounded to BF16 as in the kernel; or None."""
    factors = low_rank_factors(parts)
    if factors is None:
        return None
    up, down = factors
    return ((up.float() @ down.float()) / scale[:, None]).bfloat16().float()
