"""torch.ops.mezzotint.joint_product: two FP8 products, one for text and one for the picture, side by side in memory."""

import torch
from torch import Tensor
from torch.library import custom_op

from mezzotint.kernels.products import rounded_product


@custom_op("mezzotint::joint_product", mutates_args=())
def joint_product(
    text: Tensor,
    text_scale: Tensor,
    text_codes: Tensor,
    text_weight_scale: Tensor,
    text_bias: Tensor | None,
    picture: Tensor,
    picture_scale: Tensor,
    picture_codes: Tensor,
    picture_weight_scale: Tensor,
    picture_bias: Tensor | None,
) -> Tensor:
    """`rounded_product` of text [batch, tokens, in] and of the picture, the text's tokens first: [batch, all, out].

    In BF16. Attention reads keys and values of both as one tensor, into which PyTorch's products would be copied. Each
    picture of a batch is a product of its own, whose thousands of rows keep the GPU as busy as all of them.
    """
    out = _place(text, picture, text_codes)
    sides = (
        (text, text_scale, text_codes, text_weight_scale, text_bias, out[:, : text.shape[1]]),
        (picture, picture_scale, picture_codes, picture_weight_scale, picture_bias, out[:, text.shape[1] :]),
    )
    for x, scale, codes, weight_scale, bias, places in sides:
        scales = [scale] * len(x)
        if scale.numel() > 1:  # each aligned: cuBLASLt reads scales by row in 16 bytes at a time
            scales = [own.clone() for own in scale.reshape(*x.shape[:2], 1)]
        for sample, own, place in zip(x, scales, places, strict=True):
            rounded_product(sample, own, codes, weight_scale, bias, torch.bfloat16, place)
    return out


def _place(text: Tensor, picture: Tensor, codes: Tensor) -> Tensor:
    """Memory for the result."""
    return text.new_empty(text.shape[0], text.shape[1] + picture.shape[1], codes.shape[0], dtype=torch.bfloat16)


joint_product.register_fake(lambda text, text_scale, codes, scale, bias, picture, *others: _place(text, picture, codes))
