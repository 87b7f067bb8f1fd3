"""SVDQuant NVFP4: E2M1 codes with an e4m3 scale per 16 input columns, and a low-rank branch.

The outer scale is a number (global_scale), or one number per output row (channel_scale, if q, k and
v with different scales were fused), or absent. `mezzotint.schemes.scheme` describes smooth,
proj_down, proj_up and bias. Source: https://arxiv.org/abs/2411.05007
"""

import torch
from torch import Tensor

from mezzotint.schemes.groups import from_groups, replace_zero_with_one, scale_groups, to_groups
from mezzotint.schemes.minifloats import E2M1_MAX, round_e2m1, round_e4m3, unpack_e2m1
from mezzotint.schemes.nvfp4 import encode_nvfp4
from mezzotint.schemes.scheme import (
    COMMON_PARTS,
    FLOAT_DTYPES,
    Part,
    Parts,
    Scheme,
    per_group,
    scalar,
)

FP4_GROUP = 16


def decode_svdquant_nvfp4(parts: Parts) -> Tensor:
    """Decode the codes, without the low-rank branch.

    The values are E2M1[code] * block_scale * global_scale * channel_scale; an absent scale is 1.

    codes           uint8 [out, in/2], low nibble is the even column
    block_scale     float8_e4m3fn [out, in/16]
    global_scale    [] or [1], optional
    channel_scale   [out], optional
    Returns         float32 [out, in]
    """
    scale = parts["block_scale"].float()
    if "global_scale" in parts:
        scale = scale * parts["global_scale"].float().reshape(())
    if "channel_scale" in parts:
        scale = scale * parts["channel_scale"].float().unsqueeze(-1)
    return (to_groups(unpack_e2m1(parts["codes"]), FP4_GROUP) * scale.unsqueeze(-1)).flatten(-2)


def quantize_activation_svdquant_nvfp4(x: Tensor, _parts: Parts) -> Tensor:
    """Quantize x to E2M1 with a dynamic e4m3 scale per token and 16 columns.

    There is no global scale. Codes are computed with the scale before it is rounded to e4m3.

    Returns   float32 of x's shape, dequantized
    Source    Nunchaku's quantize_w4a4_fp4
    """
    values, block_scale = quantize_svdquant_nvfp4(x)
    return scale_groups(values, block_scale.float(), FP4_GROUP)


def quantize_svdquant_nvfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x [..., in] and return its E2M1 values and block scales.

    Returns   float32 [..., in], e4m3 [..., in/16]; see `quantize_activation_svdquant_nvfp4`
    """
    groups = to_groups(x.float(), FP4_GROUP)
    scale = groups.abs().amax(-1) / E2M1_MAX
    values = round_e2m1(groups / replace_zero_with_one(scale).unsqueeze(-1))
    return from_groups(values, x.shape[-1]), round_e4m3(scale)


SCHEME = Scheme(
    name="svdquant_nvfp4",
    title="SVDQuant NVFP4",
    bits=4,
    usual_error=0.25,
    group=FP4_GROUP,
    parts={
        "codes": Part(
            (torch.uint8,),
            lambda out, in_: ((out, in_ // 2),),
            "two E2M1 codes a byte",
            rows=True,
            columns=True,
        ),
        "block_scale": Part(
            (torch.float8_e4m3fn,),
            per_group(FP4_GROUP),
            "one e4m3 scale per 16 columns",
            scale=True,
            rows=True,
            columns=True,
        ),
    },
    optional={
        "global_scale": Part(FLOAT_DTYPES, scalar, "scale of the whole matrix", scale=True),
        "channel_scale": Part(
            FLOAT_DTYPES,
            lambda out, _in: ((out,),),
            "one scale per output row",
            scale=True,
            rows=True,
        ),
    }
    | COMMON_PARTS,
    decode=decode_svdquant_nvfp4,
    encode=encode_nvfp4,
    quantize_activation=quantize_activation_svdquant_nvfp4,
)
