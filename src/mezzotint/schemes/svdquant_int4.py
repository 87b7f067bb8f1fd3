"""SVDQuant INT4: signed 4-bit codes with a scale per 64 input columns, and a low-rank branch.

`mezzotint.schemes.scheme` describes smooth, proj_down, proj_up, shift and bias.
Source: https://arxiv.org/abs/2411.05007
"""

import torch
from torch import Tensor

from mezzotint.schemes.groups import replace_zero_with_one, to_groups
from mezzotint.schemes.minifloats import pack_nibbles, unpack_nibbles
from mezzotint.schemes.scheme import COMMON_PARTS, HALF_DTYPES, Part, Parts, Scheme, per_group

INT4_GROUP = 64
SIGNED_MAX, UNSIGNED_MAX = 7, 15


def decode_svdquant_int4(parts: Parts) -> Tensor:
    """Decode the codes, without the low-rank branch: code * block_scale.

    codes         uint8 [out, in/2], two's complement -8..7, low nibble is the even column
    block_scale   bf16 [out, in/64], amax of the group / 7
    Returns       float32 [out, in]
    """
    nibbles = unpack_nibbles(parts["codes"]).to(torch.int8)
    signed = torch.where(nibbles > SIGNED_MAX, nibbles - 16, nibbles).float()
    return (to_groups(signed, INT4_GROUP) * parts["block_scale"].float().unsqueeze(-1)).flatten(-2)


def encode_svdquant_int4(weights: Tensor) -> dict[str, Tensor]:
    """Quantize a matrix, without a low-rank branch, with block_scale = bf16(amax of the group / 7).

    weights   [out, in], any float dtype
    Returns   the parts of `decode_svdquant_int4`
    """
    groups = to_groups(weights.float(), INT4_GROUP)
    scale = replace_zero_with_one(groups.abs().amax(-1) / SIGNED_MAX).bfloat16()
    codes = torch.round(groups / scale.float().unsqueeze(-1)).clamp(-SIGNED_MAX - 1, SIGNED_MAX)
    return {
        "codes": pack_nibbles(codes.flatten(-2).to(torch.int8).view(torch.uint8) & 0xF),
        "block_scale": scale,
    }


def quantize_activation_int4(x: Tensor, parts: Parts) -> Tensor:
    """Quantize x to 4 bits with a dynamic scale per token and 64 columns.

    The input of a shifted layer is not negative: its codes are 0..15, with a scale of amax / 15.
    Other codes are -8..7, with a scale of amax / 7. Codes are computed with the float32 scale, and
    dequantized with that scale rounded to bf16.

    Returns   float32 of x's shape, dequantized
    Source    Nunchaku's quantize_w4a4_act
    """
    low, high = (0, UNSIGNED_MAX) if "shift" in parts else (-SIGNED_MAX - 1, SIGNED_MAX)
    groups = to_groups(x.float(), INT4_GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / high
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = torch.round(groups / safe).clamp(low, high)
    return (codes * scale.bfloat16().float()).flatten(-2)


SCHEME = Scheme(
    name="svdquant_int4",
    title="SVDQuant INT4",
    bits=4,
    usual_error=0.25,
    group=INT4_GROUP,
    parts={
        "codes": Part(
            (torch.uint8,),
            lambda out, in_: ((out, in_ // 2),),
            "two signed codes a byte",
            rows=True,
            columns=True,
        ),
        "block_scale": Part(
            HALF_DTYPES,
            per_group(INT4_GROUP),
            "one scale per 64 columns",
            scale=True,
            rows=True,
            columns=True,
        ),
    },
    optional=COMMON_PARTS,
    decode=decode_svdquant_int4,
    encode=encode_svdquant_int4,
    quantize_activation=quantize_activation_int4,
)
