"""Integer weights of 2 to 8 bits, with a scale per group of input columns and maybe a zero point.

The input is not quantized. GPTQ, AutoRound, compressed-tensors, torchao, quanto and SDNQ differ in
how they pack such codes, and in where they put the zero point; the arithmetic is the same.
"""

from functools import partial

import torch
from torch import Tensor

from mezzotint.schemes.groups import split_groups
from mezzotint.schemes.minifloats import pack_nibbles, unpack_nibbles
from mezzotint.schemes.scheme import (
    COMMON_PARTS,
    FLOAT_DTYPES,
    ROTATION,
    Part,
    Parts,
    Scheme,
    Shape,
    per_any_group,
)

BITS = range(2, 9)


def unpack_codes(codes: Tensor, bits: int) -> Tensor:
    """Unpack codes of `bits` bits from the bits of each row, lowest first.

    codes     uint8 [out, in * bits / 8]; bits after the last whole code are dropped
    Returns   uint8 [out, in]
    """
    if bits == 8:
        return codes
    if bits == 4:
        return unpack_nibbles(codes)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    stream = (codes.unsqueeze(-1) >> places & 1).flatten(-2)
    stream = stream[..., : stream.shape[-1] // bits * bits]
    stream = stream.reshape(*stream.shape[:-1], -1, bits)
    return (stream << places[:bits]).sum(-1, dtype=torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes 0..2^bits - 1, uint8 [out, in]: the inverse of `unpack_codes`."""
    if bits == 8:
        return codes
    if bits == 4:
        return pack_nibbles(codes)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    stream = (codes.unsqueeze(-1) >> places[:bits] & 1).flatten(-2)
    stream = stream.reshape(*stream.shape[:-1], -1, 8)
    return (stream << places).sum(-1, dtype=torch.uint8)


def decode_int_groups(parts: Parts, bits: int) -> Tensor:
    """Dequantize a matrix of unsigned codes.

    with zero_point    (code - zero_point) * block_scale
    with block_zero    code * block_scale + block_zero
    with neither       (code - 2^(bits - 1)) * block_scale

    codes         uint8 [out, in * bits / 8], lowest bits first
    block_scale   [out, in/group]; its shape shows the group
    zero_point    uint8 [out, in/group], in units of the codes
    block_zero    [out, in/group]
    Returns       float32 [out, in]
    """
    codes = unpack_codes(parts["codes"], bits).float()
    scale = parts["block_scale"].float()
    groups = split_groups(codes, scale.shape[-1])
    scale = scale.unsqueeze(-1)
    if "block_zero" in parts:
        # One rounding, as in SDNQ: addcmul multiplies and adds in one instruction.
        groups = torch.addcmul(parts["block_zero"].float().unsqueeze(-1), groups, scale)
        return groups.flatten(-2)
    if "zero_point" in parts:
        return ((groups - parts["zero_point"].float().unsqueeze(-1)) * scale).flatten(-2)
    middle = float(2 ** (bits - 1))
    return ((groups - middle) * scale).flatten(-2)


def packed_codes(bits: int) -> Part:
    """Describe unsigned codes of `bits` bits whose rows are whole bytes."""

    def shapes(out: int, in_: int) -> tuple[Shape, ...]:
        return ((out, in_ * bits // 8),)

    return Part((torch.uint8,), shapes, f"codes of {bits} bits", rows=True, columns=True)


def _int_groups(bits: int) -> Scheme:
    per_group = partial(Part, shapes=per_any_group, rows=True, columns=True)
    zero = per_group((torch.uint8,), meaning="zero point of each group")
    return Scheme(
        name=f"int{bits}_groups",
        title=f"INT{bits} in groups",
        bits=bits,
        usual_error=0.08 if bits == 8 else 0.25 if bits > 3 else 0.6,
        keeps_bias=True,
        parts={
            "codes": packed_codes(bits),
            # A scale may be negative: it belongs to a group whose extreme is negative.
            "block_scale": per_group(
                FLOAT_DTYPES, meaning="one scale per group of columns", scale=True, signed=True
            ),
        },
        optional={
            "zero_point": zero,
            "block_zero": per_group(FLOAT_DTYPES, meaning="one offset per group of columns"),
            "rotation": ROTATION,
        }
        | COMMON_PARTS,
        decode=lambda parts: decode_int_groups(parts, bits),
    )


SCHEMES = {bits: _int_groups(bits) for bits in BITS}
"""{bits of a code: scheme}"""
