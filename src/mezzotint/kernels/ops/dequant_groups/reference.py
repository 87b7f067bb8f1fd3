"""Define the dequantized matrix of a weight in groups; the kernel must match it."""

import torch
from torch import Tensor

from mezzotint.tensor import QuantTensor


def dequant_groups_reference(weight: QuantTensor, dtype: torch.dtype) -> Tensor:
    """Return the decoded codes in `dtype` [out, in], rounded from float32."""
    return weight.scheme.decode(weight.parts).to(dtype)
