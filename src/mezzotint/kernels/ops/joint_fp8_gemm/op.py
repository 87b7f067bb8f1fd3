"""torch.ops.mezzotint.joint_fp8_gemm: FP8 GEMMs for text and image tokens into one output tensor.

It calls PyTorch's GEMM and runs on any device, so it needs neither a kernel nor a reference.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from mezzotint.kernels.fp8_gemm import fp8_gemm


@custom_op("mezzotint::joint_fp8_gemm", mutates_args=())
def joint_fp8_gemm(
    text: Tensor,
    text_scale: Tensor,
    text_codes: Tensor,
    text_weight_scale: Tensor,
    text_bias: Tensor | None,
    image: Tensor,
    image_scale: Tensor,
    image_codes: Tensor,
    image_weight_scale: Tensor,
    image_bias: Tensor | None,
) -> Tensor:
    """Run `fp8_gemm` for text [batch, tokens, in] and for the image; BF16 [batch, tokens, out].

    The text's tokens come first. Attention reads keys and values of both as one tensor; PyTorch's
    GEMMs write separate tensors, which would have to be copied.
    """
    out = _allocate_output(text, image, text_codes)
    text_out, image_out = out[:, : text.shape[1]], out[:, text.shape[1] :]
    _gemm_per_sample(text, text_scale, text_codes, text_weight_scale, text_bias, text_out)
    _gemm_per_sample(image, image_scale, image_codes, image_weight_scale, image_bias, image_out)
    return out


def _gemm_per_sample(
    x: Tensor,
    scale: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Write one GEMM per sample: the rows of a batch are not adjacent in `out`.

    A sample has thousands of rows, which keep the GPU as busy as the whole batch does.
    """
    row_scales = [scale] * len(x)
    if scale.numel() > 1:  # clone to align each sample: cuBLASLt loads row scales by 16 bytes
        row_scales = [sample.clone() for sample in scale.reshape(*x.shape[:2], 1)]
    for sample, row_scale, out_slice in zip(x, row_scales, out, strict=True):
        fp8_gemm(sample, row_scale, codes, weight_scale, bias, torch.bfloat16, out_slice)


def _allocate_output(text: Tensor, image: Tensor, codes: Tensor) -> Tensor:
    """Return an uninitialized output, BF16 [batch, text and image tokens, out]."""
    tokens = text.shape[1] + image.shape[1]
    return text.new_empty(text.shape[0], tokens, codes.shape[0], dtype=torch.bfloat16)


joint_fp8_gemm.register_fake(
    lambda text, text_scale, codes, scale, bias, image, *rest: _allocate_output(text, image, codes)
)
