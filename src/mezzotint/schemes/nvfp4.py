"""NVFP4: E2M1 codes, one e4m3 scale for each 16 input columns, one float32 scale for the matrix."""

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
    """Real weights of an NVFP4 matrix: E2M1[code] * block_scale * global_scale, in float32.

    codes          uint8 [out, in/2], low nibble is the even column
    block_scale    float8_e4m3fn [out, in/16], row-major
    global_scale   float32 [], or [out] where matrices with scales of their own were joined; multiplies
    Returns        float32 [out, in]
    Source         OCP MX v1.0 for E2M1; ModelOpt: global_scale = amax / (6 * 448)
    """
    scale = parts["block_scale"].float() * parts["global_scale"].float().reshape(-1, 1)
    return scale_groups(unpack_e2m1(parts["codes"]), scale, NVFP4_GROUP)


def encode_nvfp4(weights: Tensor) -> dict[str, Tensor]:
    """The nearest NVFP4 matrix: global_scale = amax / (6 * 448), block_scale = e4m3(amax(block) / 6 / global_scale).

    weights   [out, in], any float dtype
    Returns   the parts that `decode_nvfp4` takes
    Source    ModelOpt NVFP4
    """
    unit = _global_scale(weights)
    codes, block_scale = quantize_nvfp4(weights, unit)
    return {"codes": pack_e2m1(codes), "block_scale": block_scale, "global_scale": unit}


def quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., in] in units of `unit`: its E2M1 values, float32 [..., in], and its block scales, e4m3 [..., in/16].

    block scale = e4m3(amax(block) / 6 / unit); value = E2M1(x / (block scale * unit))
    """
    blocks = to_groups(x.float(), NVFP4_GROUP)
    block_scale = round_e4m3(blocks.abs().amax(-1) / E2M1_MAX / global_scale)
    values = round_e2m1(
        blocks / replace_zero_with_one(block_scale.float() * global_scale).unsqueeze(-1)
    )
    return from_groups(values, x.shape[-1]), block_scale


def input_unit(x: Tensor, parts: Parts) -> Tensor:
    """The scale above an input's block scales, float32 []: the static input_scale, or else amax(x) / (6 * 448)."""
    return parts["input_scale"].float().reshape(()) if "input_scale" in parts else _global_scale(x)


def quantize_activation_nvfp4(x: Tensor, parts: Parts) -> Tensor:
    """x rounded to NVFP4 with one e4m3 scale per 16 columns, in units of `input_unit`; float32.

    A block whose scale rounds to zero becomes zero, as the hardware's quantizers have it.
    Source   ModelOpt NVFP4: input_scale = amax / (6 * 448); comfy-kitchen's quantize_nvfp4 gives the same numbers
    """
    unit = input_unit(x, parts)
    values, block_scale = quantize_nvfp4(x, unit)
    return scale_groups(values, block_scale.float() * unit, NVFP4_GROUP)


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
    optional={"input_scale": INPUT_SCALE} | COMMON_PARTS,
    decode=decode_nvfp4,
    encode=encode_nvfp4,
    input_max=E2M1_MAX * E4M3_MAX,
    quantize_activation=quantize_activation_nvfp4,
    static_scale_part="input_scale",
)
