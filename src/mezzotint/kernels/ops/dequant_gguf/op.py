"""torch.ops.mezzotint.dequant_gguf: dequantize a matrix of GGUF blocks."""

import torch
from torch import Tensor
from torch.library import custom_op

from mezzotint.kernels.ops.runs import RUN, TILE, WARPS, programs


@custom_op("mezzotint::dequant_gguf", mutates_args=())
def dequant_gguf(
    codes: Tensor, codebook: Tensor | None, number: int, group: int, block: int, dtype: torch.dtype
) -> Tensor:
    """Compute `dequant_gguf_reference`; return [out, in] in `dtype`.

    codes      uint8 [out, bytes of a row], contiguous
    codebook   float32 [16], the values of the codes of an IQ4 type; otherwise None
    number     GGUF's number of the type
    group      weights of a block
    block      bytes of a block
    """
    from mezzotint.kernels.ops.dequant_gguf.kernel import _dequant_gguf_kernel

    out = _empty(codes, group, block, dtype)
    runs = out.numel() // RUN
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
        _dequant_gguf_kernel[programs(runs)](
            codes,
            # An absent operand needs some pointer; the kernel never reads it.
            codes if codebook is None else codebook,
            out,
            runs,
            TYPE=number,
            GROUP=group,
            BLOCK_BYTES=block,
            TILE=TILE,
            num_warps=WARPS,
        )
    return out


@dequant_gguf.register_fake
def _fake(
    codes: Tensor, codebook: Tensor | None, number: int, group: int, block: int, dtype: torch.dtype
) -> Tensor:
    return _empty(codes, group, block, dtype)


def _empty(codes: Tensor, group: int, block: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], codes.shape[1] // block * group, dtype=dtype)
