"""torch.ops.mezzotint.dequant_groups: dequantize a matrix with scales in their own tensor."""

import torch
from torch import Tensor
from torch.library import custom_op

from mezzotint.kernels.ops.dequant_groups.kinds import FLOAT, SCALE_KINDS
from mezzotint.kernels.ops.runs import RUN, TILE, WARPS, programs


@custom_op("mezzotint::dequant_groups", mutates_args=())
def dequant_groups(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    outer: Tensor | None,
    codebook: Tensor | None,
    kind: int,
    bits: int,
    middle: float,
    zero_kind: int,
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """Compute ((code - middle or zero) * (scale * outer) + zero) * factor; [out, in] in `dtype`.

    All operands are contiguous. A scale multiplies as many consecutive weights as its number
    shows, at least eight.

    codes        8-bit [out, in * bits / 8]
    scale        one number, [out] or [out, groups]
    zero         of the scale's shape, or None
    outer        one number, [out], or None
    codebook     float32 [16] for codes that index it, otherwise None
    kind         of the codes; this and zero_kind are from `kinds`
    """
    from mezzotint.kernels.ops.dequant_groups.kernel import _dequant_groups_kernel

    out = _empty(codes, bits, dtype)
    runs = out.numel() // RUN
    scale_kind = SCALE_KINDS.get(scale.dtype, FLOAT)
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
        _dequant_groups_kernel[programs(runs)](
            # Not every GPU can load 8-bit floats.
            codes.view(torch.uint8),
            scale if scale_kind == FLOAT else scale.view(torch.uint8),
            # Absent operands need some pointer; the kernel never reads it.
            codes.view(torch.uint8) if zero is None else zero,
            codes.view(torch.uint8) if outer is None else outer,
            codes.view(torch.uint8) if codebook is None else codebook,
            out,
            runs,
            CODES=kind,
            BITS=bits,
            MIDDLE=middle,
            SCALES=scale_kind,
            SCALE_RUNS=runs // scale.numel(),
            ZERO=zero_kind,
            OUTER_RUNS=0 if outer is None else runs // outer.numel(),
            FACTOR=factor,
            TILE=TILE,
            num_warps=WARPS,
            # A fused multiply-add would not round the scaled code.
            enable_fp_fusion=False,
        )
    return out


@dequant_groups.register_fake
def _fake(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    outer: Tensor | None,
    codebook: Tensor | None,
    kind: int,
    bits: int,
    middle: float,
    zero_kind: int,
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    return _empty(codes, bits, dtype)


def _empty(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], codes.shape[1] * 8 // bits, dtype=dtype)
