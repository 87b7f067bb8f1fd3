"""FP8 times FP8 on the GPU's tensor cores, through PyTorch's scaled matrix product (cuBLASLt).

Written in ordinary PyTorch operations, so that torch.compile may fuse the rounding of the input into whatever
produced it.
"""

import torch
from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.schemes import FP8
from mezzotint.schemes.fp8 import input_scale_by_row
from mezzotint.schemes.rounding import round_e4m3
from mezzotint.tensor import PLAIN, QuantTensor

MULTIPLE = 16


class ScaledMM:
    name = "scaled_mm"
    preference = 10
    wants = PLAIN

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        if weight.scheme is not FP8:
            return Cannot(f"multiplies FP8 only, this is {weight.scheme.title}")
        if target.kind != "cuda" or target.capability is None:
            return Cannot(f"needs a CUDA GPU, this is {target}")
        if target.capability < (8, 9):
            return Cannot(f"needs FP8 tensor cores (sm_89 or newer), this is {target}")
        extra = set(weight.parts) - {"codes", "weight_scale", "input_scale"}
        if extra:
            return Cannot(f"has no way to apply {', '.join(sorted(extra))}")
        if not weight.quantizes_input(activations):
            return Cannot("multiplies FP8 by FP8, and the inputs of this layer are not quantized")
        if any(side % MULTIPLE for side in weight.shape):
            return Cannot(
                f"needs sides that are multiples of {MULTIPLE}, this is {weight.shape[0]} x {weight.shape[1]}"
            )
        return Can()

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        out_features, in_features = weight.shape
        rows = x.reshape(-1, in_features)
        static = weight.parts.get("input_scale")
        input_scale = input_scale_by_row(rows) if static is None else static.reshape(1, 1)
        weight_scale = weight.parts["weight_scale"].reshape(1, -1)
        codes = round_e4m3(rows.float() / input_scale)
        if static is None or weight_scale.shape[1] > 1:
            # cuBLASLt scales either both sides by row, or neither
            input_scale = input_scale.expand(rows.shape[0], 1).contiguous()
            weight_scale = weight_scale.expand(1, out_features).contiguous()
        fused = bias is not None and bias.dtype == x.dtype and x.dtype != torch.float32
        product = torch._scaled_mm(
            codes,
            weight.parts["codes"].t(),
            scale_a=input_scale,
            scale_b=weight_scale,
            bias=bias if fused else None,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        if bias is not None and not fused:  # cuBLASLt adds no bias to a float32 product
            product = product + bias
        return product.reshape(*x.shape[:-1], out_features)


BACKEND = ScaledMM()
