"""AWQ W4A16 layers (modulation): multiply a 4-bit matrix by a few vectors, reading it once.

AWQ: https://arxiv.org/abs/2306.00978
"""

import importlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.fp8_gemm import GEMV_MAX_ROWS
from mezzotint.kernels.ops.code_kinds import UNSIGNED
from mezzotint.kernels.requirements import (
    TRITON,
    check_requirements,
    require_bf16_gpu,
    require_known_parts,
    require_scheme,
)
from mezzotint.kernels.target import Target
from mezzotint.schemes import AWQ_W4A16
from mezzotint.tensor import PLAIN, QuantTensor


class Gemv:
    name = "gemv"
    priority = 20
    weight_layout = PLAIN
    schemes = (AWQ_W4A16,)

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return check_requirements(
            require_scheme(weight, AWQ_W4A16),
            require_bf16_gpu(target),
            require_known_parts(weight, {"bias"}),
            libraries=(TRITON,),
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        """Register the operation; return ones, float32 [out], as AWQ has no factor per row."""
        importlib.import_module("mezzotint.kernels.ops.gemv.op")
        codes = weight.parts["codes"]
        return {"ones": torch.ones(codes.shape[0], dtype=torch.float32, device=codes.device)}

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        x2d, parts = x.reshape(-1, weight.shape[1]), weight.parts
        # More rows are bound by arithmetic, and the kernel does not use tensor cores.
        if x2d.shape[0] > GEMV_MAX_ROWS:
            return F.linear(x, weight.scheme.decode(parts).to(x.dtype), bias)
        y: Tensor = torch.ops.mezzotint.gemv4(
            x2d.contiguous(),
            parts["codes"],
            parts["block_scale"],
            parts["block_zero"],
            weight.prepared["ones"],
            UNSIGNED,
            weight.scheme.group,
        )
        y = y if bias is None else y + bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


BACKEND = Gemv()
