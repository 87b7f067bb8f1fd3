"""The weight of a layer in the dtype of its input, for an ordinary GEMM."""

import torch
from torch import Tensor

from mezzotint.kernels.backend import WeightSpec
from mezzotint.kernels.ops.dequant_gguf.op import dequant_gguf
from mezzotint.kernels.ops.dequant_gguf.types import TYPES
from mezzotint.kernels.ops.dequant_groups.kinds import (
    CODE_KINDS,
    CODEBOOK,
    E2M1,
    FUSED_OFFSET,
    NO_ZERO,
    OFFSET,
    ZERO_POINT,
)
from mezzotint.kernels.ops.dequant_groups.op import dequant_groups
from mezzotint.kernels.ops.runs import RUN
from mezzotint.schemes import (
    AWQ_CENTERED,
    AWQ_W4A16,
    CODEBOOK4,
    FP8,
    FP8_E5M2,
    FP8_GROUPS,
    INT8,
    INT_GROUPS,
    LLM_INT8,
    MXFP8,
    NVFP4,
    schemes,
)
from mezzotint.schemes.awq_centered import MIDDLE
from mezzotint.schemes.gguf_iq4_nl import VALUES
from mezzotint.schemes.llm_int8 import INVERSE_MAX
from mezzotint.tensor import QuantTensor

SCALES = {
    **{scheme.name: "weight_scale" for scheme in (FP8, FP8_E5M2, INT8)},
    **{scheme.name: "block_scale" for scheme in (AWQ_CENTERED, AWQ_W4A16, CODEBOOK4)},
    **{scheme.name: "block_scale" for scheme in (FP8_GROUPS, MXFP8, NVFP4, *INT_GROUPS.values())},
    LLM_INT8.name: "row_amax",
}
"""{name of a scheme of the operation dequant_groups: the part with its scales}"""
SCHEMES = tuple(schemes()[name] for name in (*TYPES, *SCALES))
"""The schemes that have a kernel."""


def dequantize(weight: QuantTensor, dtype: torch.dtype) -> Tensor:
    """Return `scheme.decode(parts)` in `dtype` [out, in], computed by one kernel."""
    return (
        _from_blocks(weight, dtype) if weight.scheme.name in TYPES else _from_groups(weight, dtype)
    )


def prepare_codebook(weight: QuantTensor) -> dict[str, Tensor]:
    """Return the codebook of a scheme whose layers have none: float32 [16]."""
    if not weight.scheme.name.startswith("gguf_iq4"):
        return {}
    device = weight.parts["codes"].device
    return {"codebook": torch.tensor(VALUES, dtype=torch.float32, device=device)}


def require_even_runs(weight: WeightSpec) -> str | None:
    """Require that eight consecutive weights always share a scale."""
    in_features = weight.shape[1]
    groups = weight.parts["block_scale"][-1] if "block_scale" in weight.parts else 1
    group = max(weight.scheme.group, in_features // groups)  # the last group may be short
    if in_features % group == 0 and group % RUN == 0:
        return None
    return (
        f"needs whole groups of a multiple of {RUN} input features, "
        f"this is {groups} groups of {in_features}"
    )


def require_multiplied_scale(weight: WeightSpec) -> str | None:
    """Require that no scale divides: the rounded reciprocal gives other weights."""
    if "global_divisor" in weight.parts:
        return "multiplies by the global scale, and this layer's weights are divided by one"
    return None


def _from_blocks(weight: QuantTensor, dtype: torch.dtype) -> Tensor:
    codes, group = weight.parts["codes"], weight.scheme.group
    decoded: Tensor = dequant_gguf(
        codes.contiguous(),
        weight.prepared.get("codebook"),
        TYPES[weight.scheme.name],
        group,
        codes.shape[1] * group // weight.shape[1],
        dtype,
    )
    return decoded


def _from_groups(weight: QuantTensor, dtype: torch.dtype) -> Tensor:
    parts, scheme = weight.parts, weight.scheme
    zero, zero_kind = _zero(weight)
    decoded: Tensor = dequant_groups(
        parts["codes"].contiguous(),
        parts[SCALES[scheme.name]].contiguous(),
        zero,
        parts.get("global_scale"),
        parts.get("codebook"),
        _code_kind(weight),
        scheme.bits,
        _middle(weight),
        zero_kind,
        INVERSE_MAX if scheme is LLM_INT8 else 1.0,
        dtype,
    )
    return decoded


def _code_kind(weight: QuantTensor) -> int:
    if weight.scheme in (CODEBOOK4, NVFP4):
        return CODEBOOK if weight.scheme is CODEBOOK4 else E2M1
    return CODE_KINDS[weight.parts["codes"].dtype]


def _zero(weight: QuantTensor) -> tuple[Tensor | None, int]:
    """Return the zeros of the groups and their kind."""
    parts = weight.parts
    if "zero_point" in parts:
        return parts["zero_point"].contiguous(), ZERO_POINT
    if "block_zero" in parts:
        fused = weight.scheme in INT_GROUPS.values()
        return parts["block_zero"].contiguous(), FUSED_OFFSET if fused else OFFSET
    return None, NO_ZERO


def _middle(weight: QuantTensor) -> float:
    """Return the code that stands for zero, where no part says so."""
    if weight.scheme is AWQ_CENTERED:
        return MIDDLE
    symmetric = weight.scheme in INT_GROUPS.values() and _zero(weight)[1] == NO_ZERO
    return 2 ** (weight.scheme.bits - 1) if symmetric else 0
