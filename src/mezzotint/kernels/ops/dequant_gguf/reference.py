"""Define the dequantized matrix of GGUF blocks; the kernel must match it."""

import torch
from torch import Tensor

from mezzotint.schemes import Scheme


def dequant_gguf_reference(codes: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Return the weights in `dtype` [out, in], rounded from float32.

    codes   uint8 [out, bytes of a row]
    """
    return scheme.decode({"codes": codes}).to(dtype)
