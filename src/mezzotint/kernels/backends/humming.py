"""NVFP4 weights with BF16 activations (W4A16) by Humming, which compiles kernels on demand.

For GPUs without FP4 tensor cores. Activations are not quantized. Humming reorders codes and scales
into a second copy.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mezzotint.kernels.backend import Can, Cannot, WeightSpec
from mezzotint.kernels.epilogue import apply_epilogue
from mezzotint.kernels.nvfp4_gemm import split_outer_scale
from mezzotint.kernels.optional_library import OptionalLibrary
from mezzotint.kernels.requirements import (
    check_requirements,
    require_bf16_gpu,
    require_multiple_of,
    require_scheme,
)
from mezzotint.kernels.target import Target
from mezzotint.schemes import NVFP4
from mezzotint.tensor import PLAIN, QuantTensor

LIBRARY = OptionalLibrary(
    "humming-kernels", "humming", "0.1.19", "pip install 'humming-kernels[cu13]'"
)
OUT_MULTIPLE, IN_MULTIPLE = 128, 64
"""Tiles have 128 rows on sm_90; 64 would be enough elsewhere."""
LOCKS = 2048
"""Synchronization counters between the blocks of a GEMM; each layer needs its own."""


class Humming:
    name = "humming"
    priority = 15
    weight_layout = PLAIN
    schemes = (NVFP4,)

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return check_requirements(
            require_scheme(weight, NVFP4),
            require_bf16_gpu(target),
            require_multiple_of(weight, OUT_MULTIPLE, IN_MULTIPLE),
            libraries=(LIBRARY,),
        )

    def prepare(self, weight: QuantTensor) -> Mapping[str, Tensor]:
        """Return weight, weight_scale, weight_scale_2 and locks in Humming's form.

        If scales are per row, also return row_factor as in `split_outer_scale`.
        """
        from humming.transform import transform_humming_tensors

        outer = split_outer_scale(weight)
        codes = weight.parts["codes"].contiguous()
        tensors = {
            "weight": codes.view(torch.int32),  # eight codes per word
            "weight_scale": weight.parts["block_scale"],
            "weight_scale_2": outer.pop("alpha").reshape(1),
        }
        config = _config(*weight.shape, codes.device)
        reordered: dict[str, Tensor] = transform_humming_tensors(config, tensors)
        locks = torch.zeros(LOCKS, dtype=torch.int32, device=codes.device)
        return reordered | outer | {"locks": locks}

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        from humming.ops import humming_gemm

        prepared = weight.prepared

        def gemm(z: Tensor, gemm_bias: Tensor | None) -> Tensor:
            y: Tensor = humming_gemm(
                layer_config=_config_text(*weight.shape, z.device),
                inputs=z.contiguous(),
                weight=prepared["weight"],
                weight_scale=prepared["weight_scale"],
                weight_scale_2=prepared["weight_scale_2"],
                locks=prepared["locks"],
            )
            return y if gemm_bias is None else y + gemm_bias

        return apply_epilogue(x.bfloat16(), weight, bias, gemm).to(x.dtype)


@cache
def _config(out_features: int, in_features: int, device: torch.device) -> Any:
    """Return Humming's description of a ModelOpt NVFP4 matrix and of the GPU."""
    from humming.schema.modelopt import ModeloptNvfp4WeightSchema
    from humming.transform import prepare_layer_config

    schema = ModeloptNvfp4WeightSchema().to_humming_schema(torch.bfloat16)
    return prepare_layer_config(
        out_features, in_features, schema, torch_dtype=torch.bfloat16, device=device
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _config_text(out_features: int, in_features: int, device: torch.device) -> str:
    # torch.compile cannot trace Humming's objects, but the operator takes the text.
    return str(_config(out_features, in_features, device).to_str())


BACKEND = Humming()
