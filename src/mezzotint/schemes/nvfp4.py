"""NVFP4: E2M1 codes, with an e4m3 scale per 16 input columns and a float32 scale per matrix."""

import torch
from torch import Tensor

from mezzotint.schemes.groups import (
    from_groups,
    group_count,
    replace_zero_with_one,
    scale_groups,
    to_groups,
)
from mezzotint.schemes.minifloats import (
    E2M1_MAX,
    E4M3_MAX,
    pack_e2m1,
    round_e2m1,
    round_e4m3,
    unpack_e2m1,
)
from mezzotint.schemes.scheme import (
    COMMON_PARTS,
    FLOAT32,
    INPUT_SCALE,
    Part,
    Parts,
    Scheme,
    scalar_or_per_row,
)

NVFP4_GROUP = 16


def decode_nvfp4(parts: Parts) -> Tensor:
    """Dequantize an NVFP4 matrix: E2M1[code] * block_scale * global_scale.

    codes            uint8 [out, in/2], low nibble is the even column
    block_scale      float8_e4m3fn [out, in/16], row-major
    global_scale     float32 [], or [out] if matrices with different scales were concatenated
    global_divisor   of which global_scale is the rounded reciprocal: the exact scale, if present
    Returns          float32 [out, in]
    Source           OCP Microscaling Formats v1.0 for E2M1;
                     ModelOpt: global_scale = amax / (6 * 448)
    """
    scale = parts["block_scale"].float()
    if "global_divisor" in parts:
        scale = scale / parts["global_divisor"].reshape(-1, 1)
    else:
        scale = scale * parts["global_scale"].float().reshape(-1, 1)
    return scale_groups(unpack_e2m1(parts["codes"]), scale, NVFP4_GROUP)


def encode_nvfp4(weights: Tensor) -> dict[str, Tensor]:
    """Quantize a matrix to NVFP4 with global_scale = amax / (6 * 448); see `quantize_nvfp4`.

    weights   [out, in], any float dtype
    Returns   the parts of `decode_nvfp4`
    Source    ModelOpt NVFP4
    """
    global_scale = _global_scale(weights)
    codes, block_scale = quantize_nvfp4(weights, global_scale)
    return {"codes": pack_e2m1(codes), "block_scale": block_scale, "global_scale": global_scale}


def quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x [..., in] and return its E2M1 values and block scales.

    Returns   float32 [..., in], e4m3 [..., in/16]

    block scale = e4m3(amax(block) / 6 / global_scale)
    value = E2M1(x / (block scale * global_scale))
    """
    blocks = to_groups(x.float(), NVFP4_GROUP)
    block_scale = round_e4m3(blocks.abs().amax(-1) / E2M1_MAX / global_scale)
    values = round_e2m1(
        blocks / replace_zero_with_one(block_scale.float() * global_scale).unsqueeze(-1)
    )
    return from_groups(values, x.shape[-1]), block_scale


def input_unit(x: Tensor, parts: Parts) -> Tensor:
    """Return an input's global scale, float32 []: input_scale, or else amax(x) / (6 * 448)."""
    return parts["input_scale"].float().reshape(()) if "input_scale" in parts else _global_scale(x)


def quantize_activation_nvfp4(x: Tensor, parts: Parts) -> Tensor:
    """Quantize x to NVFP4, with the global scale of `input_unit`.

    A block whose scale rounds to zero becomes zero, as in the GPU quantizers.

    Returns   float32 of x's shape, dequantized
    Source    ModelOpt NVFP4: input_scale = amax / (6 * 448); comfy-kitchen's quantize_nvfp4 agrees
    """
    global_scale = input_unit(x, parts)
    values, block_scale = quantize_nvfp4(x, global_scale)
    return scale_groups(values, block_scale.float() * global_scale, NVFP4_GROUP)


def _global_scale(x: Tensor) -> Tensor:
    return replace_zero_with_one(x.float().abs().amax() / (E2M1_MAX * E4M3_MAX))


SCHEME = Scheme(
    name="nvfp4",
    title="NVFP4",
    bits=4,
    usual_error=0.25,
    keeps_bias=True,
    group=NVFP4_GROUP,
    parts={
        "codes": Part(
            (torch.uint8,),
            lambda out, in_: ((out, in_ // 2),),
            "two E2M1 codes a byte",
            rows=True,
            columns=True,
        ),
        "block_scale": Part(
            (torch.float8_e4m3fn, torch.uint8),
            lambda out, in_: ((out, group_count(in_, NVFP4_GROUP)),),
            "one e4m3 scale per 16 columns",
            scale=True,
            rows=True,
            columns=True,
        ),
        "global_scale": Part(
            FLOAT32, scalar_or_per_row, "scale of the whole matrix", scale=True, rows=True
        ),
    },
    optional={
        "input_scale": INPUT_SCALE,
        "global_divisor": Part(
            FLOAT32, scalar_or_per_row, "divisor of the whole matrix", scale=True, rows=True
        ),
    }
    | COMMON_PARTS,
    decode=decode_nvfp4,
    encode=encode_nvfp4,
    input_max=E2M1_MAX * E4M3_MAX,
    quantize_activation=quantize_activation_nvfp4,
    static_scale_part="input_scale",
)
