"""AWQ W4A16 layers, which are modulations: a matrix of 4-bit codes times a few vectors, read once."""

import importlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.kernels.products import FEW
from mezzotint.kernels.refusals import TRITON, answer, other_gpu, other_parts, other_scheme
from mezzotint.schemes import AWQ_W4A16
from mezzotint.tensor import PLAIN, QuantTensor

UNSIGNED = 2


class Gemv:
    name = "gemv"
    preference = 20
    wants = PLAIN
    schemes = (AWQ_W4A16,)

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return answer(
            other_scheme(weight, AWQ_W4A16),
            other_gpu(target, "BF16 tensor cores (sm_80 or newer)", lambda own: own >= (8, 0)),
            other_parts(weight, {"bias"}),
            library=TRITON,
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        importlib.import_module("mezzotint.kernels.triton_ops.gemv")
        codes = weight.parts["codes"]
        return {"ones": torch.ones(codes.shape[0], dtype=torch.float32, device=codes.device)}

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        rows, parts = x.reshape(-1, weight.shape[1]), weight.parts
        if rows.shape[0] > FEW:
            return F.linear(x, weight.scheme.decode(parts).to(x.dtype), bias)
        product: Tensor = torch.ops.mezzotint.gemv4(
            rows.contiguous(),
            parts["codes"],
            parts["block_scale"],
            parts["block_zero"],
            weight.prepared["ones"],
            UNSIGNED,
            weight.scheme.group,
        )
        product = product if bias is None else product + bias.float()
        return product.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


BACKEND = Gemv()
