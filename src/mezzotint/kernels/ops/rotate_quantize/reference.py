"""Define the rotation and INT8 quantization of an input; the kernel must match it."""

import torch
from torch import Tensor

from mezzotint.schemes.int8 import to_int8
from mezzotint.schemes.rotation import rotate


def rotate_quantize_reference(
    x: Tensor, signs: Tensor, input_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rotate each group of columns, and quantize the result to INT8.

    x             [rows, columns]; columns is a multiple of the group
    signs         int8 [group, group], see `mezzotint.schemes.rotation`
    input_scale   float32, one element, or None for one scale per row: amax / 127
    Returns       codes int8 [rows, columns]; scale float32, [1, 1] or [rows, 1]
    """
    integers, scale = to_int8(rotate(x.float(), signs), input_scale)
    return integers.to(torch.int8), scale
