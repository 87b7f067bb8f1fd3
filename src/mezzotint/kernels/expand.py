"""4-bit weights that stay 4 bits in memory, written out as FP8 just before each product on FP8 tensor cores.

For GPUs whose tensor cores know FP8 and not FP4 (Ada, Hopper), and for SVDQuant everywhere. What is written out is the
whole matrix that multiplies the layer's input: codes, scales, low-rank branch and smoothing together, with one scale
for each row, or one for all where the input has a static one: cuBLASLt scales either both by row or neither. So there
is no second product for the low-rank branch, and the input is rounded to FP8 instead of 4 bits.
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.kernels.products import FEW, MULTIPLE, fp8_product, scaled_input
from mezzotint.kernels.refusals import TRITON, answer, exact_input, odd_sides, other_gpu, other_scheme
from mezzotint.schemes import FP8, NVFP4, SVDQUANT_INT4, SVDQUANT_NVFP4
from mezzotint.schemes.rounding import E2M1_MAX, E4M3_MAX, expand_e2m1, expand_nibbles, round_e4m3
from mezzotint.schemes.scheme import Parts
from mezzotint.tensor import PLAIN, QuantTensor

SCHEMES = (NVFP4, SVDQUANT_INT4, SVDQUANT_NVFP4)
KERNELS = "mezzotint.kernels.triton_ops"


class Expand:
    name = "expand"
    preference = 20
    wants = PLAIN
    schemes = SCHEMES

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return answer(
            *against_expanding(weight, activations),
            other_gpu(target, "FP8 tensor cores (sm_89 or newer)", lambda own: own >= (8, 9)),
            library=TRITON,
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        """scale, factor [out] float32; column [in], bias [out] float32 where there is something to say."""
        importlib.import_module(f"{KERNELS}.expand")
        importlib.import_module(f"{KERNELS}.gemv")
        return prepared(weight)

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        rows = x.reshape(-1, weight.shape[1])
        parts = weight.parts
        if has_static_input(parts):
            rows = scaled_input(rows, parts)
        bias = full_bias(weight, bias)
        if rows.shape[0] <= FEW and low_rank(parts) is None:
            product = few_rows(rows, weight)
            product = (product if bias is None else product + bias.float()).to(x.dtype)
        else:
            product = fp8_product(rows, expand(weight), weight_scale(weight), bias, input_scale_fp8(weight))
        return product.reshape(*x.shape[:-1], weight.shape[0])


def against_expanding(weight: WeightSpec, activations: str) -> Iterator[str | None]:
    """Reasons why a weight has no FP8 form that stands for it, on any device."""
    yield other_scheme(weight, *SCHEMES)
    yield exact_input(weight, activations, "FP8")
    if has_static_input(weight.parts) and "proj_down" in weight.parts:
        yield "has no way to apply a low-rank branch on the layer's own input beside a static input scale"
    yield odd_sides(weight, MULTIPLE, max(MULTIPLE, weight.scheme.group))


def can_expand(weight: WeightSpec, activations: str) -> Can | Cannot:
    """Whether a weight has an FP8 form that stands for it."""
    return answer(*against_expanding(weight, activations))


def has_static_input(parts: Mapping[str, object]) -> bool:
    return "input_scale" in parts


def input_scale_fp8(weight: QuantTensor) -> Tensor | None:
    """The FP8 scale of an input whose NVFP4 scale is amax / (6 * 448): amax / 448."""
    return weight.parts["input_scale"] * E2M1_MAX if has_static_input(weight.parts) else None


def weight_scale(weight: QuantTensor) -> Tensor:
    """What a prepared weight's FP8 codes are in units of: float32 [1] beside a static input scale, else [out]."""
    scale = weight.prepared["scale"]
    return scale[:1] if has_static_input(weight.parts) else scale


def full_bias(weight: QuantTensor, bias: Tensor | None) -> Tensor | None:
    """The bias, with what a prepared weight makes of a shifted input; in float32 if there is no other."""
    of_shift = weight.prepared.get("bias")
    if bias is None or of_shift is None:
        return of_shift if bias is None else bias
    return (bias.float() + of_shift).to(bias.dtype)


def low_rank(parts: Parts) -> tuple[Tensor, Tensor] | None:
    """The low-rank branch, (up, down), whichever input it is on."""
    for branch in ("lora", "proj"):
        if f"{branch}_down" in parts:
            return parts[f"{branch}_up"], parts[f"{branch}_down"]
    return None


def _outer_scale(parts: Parts, rows: int) -> Tensor:
    """What multiplies the codes besides their block's scale, float32 [out]."""
    outer = torch.ones(rows, dtype=torch.float32, device=parts["codes"].device)
    for name in ("global_scale", "channel_scale"):
        if name in parts:
            outer = outer * parts[name].float().reshape(-1)
    return outer


def _column_factor(parts: Parts) -> Tensor | None:
    """What multiplies the input's columns and is taken into the matrix, float32 [in], or None."""
    if has_static_input(parts) or not {"pre_quant_scale", "smooth"} & set(parts):
        return None
    factor = torch.ones_like(parts["smooth" if "smooth" in parts else "pre_quant_scale"], dtype=torch.float32)
    if "pre_quant_scale" in parts:
        factor = factor * parts["pre_quant_scale"].float()
    return factor / parts["smooth"].float() if "smooth" in parts else factor


def prepared(weight: QuantTensor) -> dict[str, Tensor]:
    """Per row: its FP8 scale (amax / 448, of the whole matrix beside a static input scale), and what the codes times
    their block's scale are then multiplied by; per column: the smoothing, if any; the bias of a shifted layer."""
    parts = weight.parts
    outer, column = _outer_scale(parts, weight.shape[0]), _column_factor(parts)
    ones = torch.ones_like(outer)
    whole = _matrix(weight, outer, ones, column)
    scale = whole.abs().amax(1) / E4M3_MAX
    scale = scale.amax().expand_as(scale) if has_static_input(parts) else scale
    scale = torch.where(scale > 0, scale, ones)
    ready = {"scale": scale, "factor": outer / scale}
    if column is not None:
        ready["column"] = column
    if "shift" in parts:
        codes = weight.scheme.decode(parts)
        ready["bias"] = (codes if column is None else codes * column).sum(1) * parts["shift"].float()
    return ready


def _matrix(weight: QuantTensor, factor: Tensor, scale: Tensor, column: Tensor | None) -> Tensor:
    """What is rounded to FP8, in units of each row's `scale`; float32 [out, in]."""
    parts, group = weight.parts, weight.scheme.group
    if weight.scheme is SVDQUANT_INT4:
        values = ((expand_nibbles(parts["codes"]) ^ 8).to(torch.int16) - 8).float()
    else:
        values = expand_e2m1(parts["codes"])
    values = values.reshape(len(values), -1, group) * parts["block_scale"].float().unsqueeze(-1)
    values = values.flatten(-2) * factor[:, None]
    branch = low_rank(parts)
    product = None if branch is None else ((branch[0].float() @ branch[1].float()) / scale[:, None]).bfloat16().float()
    if product is not None and "lora_down" in parts:
        values = values + product
    if column is not None:
        values = values * column
    return values if product is None or "lora_down" in parts else values + product


def expand_by_definition(weight: QuantTensor) -> Tensor:
    """The FP8 codes that a prepared weight is written out as, e4m3 [out, in]:

    e4m3(((code * block_scale * factor + lora / scale) * column) + proj / scale), in float32, the low-rank branch
    rounded to BF16.

    Times the `scale` of its row, each is the FP8 number nearest to the real weight that multiplies the layer's input,
    or the scaled input where a static scale was measured on that.
    """
    ready = weight.prepared
    return round_e4m3(_matrix(weight, ready["factor"], ready["scale"], ready.get("column")))


def as_fp8(weight: QuantTensor) -> QuantTensor:
    """The same layer with the matrix written out once and for all: FP8 with the scales that `weight_scale` has.

    What is left of the input's side is a static scale and what that was measured on.
    """
    ready = replace(weight, prepared=prepared(weight))
    parts = {"codes": expand_by_definition(ready), "weight_scale": weight_scale(ready)}
    bias = full_bias(ready, weight.parts.get("bias"))
    if bias is not None:
        parts["bias"] = bias
    static = input_scale_fp8(weight)
    if static is not None:
        parts |= {"input_scale": static}
        parts |= {name: weight.parts[name] for name in ("pre_quant_scale",) if name in weight.parts}
    return QuantTensor(FP8, PLAIN, weight.shape, parts, weight.dynamic_input or static is None)


def expand(weight: QuantTensor) -> Tensor:
    """`expand_by_definition`, by the kernel that `prepare` has brought in."""
    parts, ready = weight.parts, weight.prepared
    up, down = low_rank(parts) or (None, None)
    codes: Tensor = torch.ops.mezzotint.expand(
        parts["codes"],
        parts["block_scale"],
        ready["factor"],
        ready["scale"],
        ready.get("column"),
        up,
        down,
        1 if weight.scheme is SVDQUANT_INT4 else 0,
        weight.scheme.group,
        "lora_down" in parts,
    )
    return codes


def few_rows(x: Tensor, weight: QuantTensor) -> Tensor:
    """x [few, in], not rounded, times the matrix as it is stored; float32 [few, out]."""
    parts, ready = weight.parts, weight.prepared
    if "column" in ready:
        x = x * ready["column"].to(x.dtype)
    product: Tensor = torch.ops.mezzotint.gemv4(
        x.contiguous(),
        parts["codes"],
        parts["block_scale"],
        None,
        ready["factor"] * ready["scale"],
        1 if weight.scheme is SVDQUANT_INT4 else 0,
        weight.scheme.group,
    )
    return product


BACKEND = Expand()
