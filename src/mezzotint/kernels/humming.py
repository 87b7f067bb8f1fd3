"""NVFP4 weights times inputs in BF16 (W4A16) by Humming, which compiles its kernels as they are needed.

For GPUs without FP4 tensor cores; the input is not rounded. Humming keeps codes and scales in an order of its own, a
second copy beside the layer's parts.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, Target, WeightSpec
from mezzotint.kernels.branches import around
from mezzotint.kernels.libraries import Library
from mezzotint.kernels.nvfp4_product import outer_scale
from mezzotint.kernels.refusals import answer, odd_sides, other_gpu, other_scheme
from mezzotint.schemes import NVFP4
from mezzotint.tensor import PLAIN, QuantTensor

LIBRARY = Library("humming-kernels", "humming", "0.1.19", "pip install 'humming-kernels[cu13]'")
ROWS, COLUMNS = 128, 64
"""On sm_90 its tiles have 128 rows; elsewhere 64 would do."""
LOCKS = 2048
"""Counters by which blocks of one product wait for each other; each layer needs its own."""


class Humming:
    name = "humming"
    preference = 15
    wants = PLAIN
    schemes = (NVFP4,)

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return answer(
            other_scheme(weight, NVFP4),
            other_gpu(target, "BF16 tensor cores (sm_80 or newer)", lambda own: own >= (8, 0)),
            odd_sides(weight, ROWS, COLUMNS),
            library=LIBRARY,
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        """weight, weight_scale, weight_scale_2 and locks as Humming has them; row_factor as `outer_scale` has it."""
        from humming.transform import transform_humming_tensors

        outer = outer_scale(weight)
        codes = weight.parts["codes"].contiguous()
        tensors = {
            "weight": codes.view(torch.int32),
            "weight_scale": weight.parts["block_scale"],
            "weight_scale_2": outer.pop("alpha").reshape(1),
        }
        arranged: dict[str, Tensor] = transform_humming_tensors(_config(*weight.shape, codes.device), tensors)
        return arranged | outer | {"locks": torch.zeros(LOCKS, dtype=torch.int32, device=codes.device)}

    def linear(self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str) -> Tensor:
        from humming.ops import humming_gemm

        ready = weight.prepared

        def product(z: Tensor, own_bias: Tensor | None) -> Tensor:
            y: Tensor = humming_gemm(
                layer_config=_config_text(*weight.shape, z.device),
                inputs=z.contiguous(),
                weight=ready["weight"],
                weight_scale=ready["weight_scale"],
                weight_scale_2=ready["weight_scale_2"],
                locks=ready["locks"],
            )
            return y if own_bias is None else y + own_bias

        return around(x.bfloat16(), weight, bias, product).to(x.dtype)


@cache
def _config(out_features: int, in_features: int, device: torch.device) -> Any:
    """Humming's description of an NVFP4 matrix, as ModelOpt has them, and of the GPU that it is on."""
    from humming.schema.modelopt import ModeloptNvfp4WeightSchema
    from humming.transform import prepare_layer_config

    schema = ModeloptNvfp4WeightSchema().to_humming_schema(torch.bfloat16)
    return prepare_layer_config(out_features, in_features, schema, torch_dtype=torch.bfloat16, device=device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _config_text(out_features: int, in_features: int, device: torch.device) -> str:
    return str(_config(out_features, in_features, device).to_str())


BACKEND = Humming()
