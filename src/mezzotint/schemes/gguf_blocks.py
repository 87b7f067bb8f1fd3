"""What GGUF's block schemes share: a row is a run of blocks, whose scales lie among the codes.

The blocks stay as the file has them. A layer has one part, `codes`: uint8 [out, bytes of a row].
Each scheme decodes to the same float32 numbers as `gguf.quants.dequantize` of gguf-py 0.19.
Source: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/quants.py
and https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (the structures)
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mezzotint.schemes.scheme import COMMON_PARTS, Part, Parts, Scheme

SCALE_BYTES = 2
SMALL, LARGE = 32, 256
"""Elements of the blocks of the older schemes and of the K schemes."""
NIBBLES, PAIRS, BITS = (0, 4), (0, 2, 4, 6), tuple(range(8))
"""Shifts that take bytes apart into 4, 2 and 1 bits."""

Decode = Callable[[Tensor], Tensor]
"""Blocks, uint8 [..., bytes of a block], to float32 [..., elements of a block]."""
Encode = Callable[[Tensor], Tensor]
"""The reverse of `Decode`."""


def block_scheme(
    name: str,
    *,
    bits: int,
    group: int,
    block_bytes: int,
    usual_error: float,
    scales_at: tuple[int, ...],
    decode: Decode,
    encode: Encode | None = None,
) -> Scheme:
    """Return the scheme of a block type.

    name          GGUF's name of the type, such as "Q4_K"
    group         elements of a block
    scales_at     where the float16 scales begin, in bytes from the start of a block
    encode        None for types that gguf-py does not encode
    """

    def decode_rows(parts: Parts) -> Tensor:
        return decode(to_blocks(parts["codes"], block_bytes)).flatten(-2)

    def encode_rows(weights: Tensor) -> dict[str, Tensor]:
        assert encode is not None  # noqa: S101
        return {"codes": encode(to_blocks(weights.float(), group)).flatten(-2)}

    def scales(codes: Tensor) -> Tensor:
        blocks = to_blocks(codes, block_bytes)
        fields = [blocks[..., start : start + SCALE_BYTES] for start in scales_at]
        return to_floats(torch.cat(fields, dim=-1))

    codes = Part(
        (torch.uint8,),
        lambda out, in_: ((out, in_ // group * block_bytes),) if in_ % group == 0 else (),
        f"rows of blocks of {group} weights",
        rows=True,
        columns=True,
        packed_scales=scales,
        packed_at=scales_at,
    )
    return Scheme(
        name=f"gguf_{name.lower()}",
        title=f"GGUF {name}",
        bits=bits,
        usual_error=usual_error,
        keeps_bias=True,
        group=group,
        parts={"codes": codes},
        optional=COMMON_PARTS,
        decode=decode_rows,
        encode=None if encode is None else encode_rows,
    )


def to_blocks(row: Tensor, size: int) -> Tensor:
    """Reshape [..., n] to [..., n / size, size]: rows of bytes or weights to blocks of them."""
    return row.reshape(*row.shape[:-1], -1, size)


def in_groups(block: Tensor, groups: int) -> Tensor:
    """Reshape the codes of a block, [..., n], to its groups: [..., groups, n / groups]."""
    return block.reshape(*block.shape[:-1], groups, -1)


def fields(blocks: Tensor, *sizes: int) -> list[Tensor]:
    """Split blocks, uint8 [..., bytes], into successive fields of these sizes in bytes."""
    return [
        blocks[..., end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)
    ]


def to_floats(field: Tensor) -> Tensor:
    """Return float16 numbers as float32: uint8 [..., 2n] to [..., n]."""
    return field.contiguous().view(torch.float16).float()


def from_floats(numbers: Tensor) -> Tensor:
    """Return the bytes of numbers rounded to float16: [..., n] to uint8 [..., 2n]."""
    return numbers.half().view(torch.uint8)


def unpack(field: Tensor, width: int, shifts: Sequence[int]) -> Tensor:
    """Take bytes apart into codes of s = 8 / len(shifts) bits: uint8 [..., n] to [..., n * 8 / s].

    Every `width` bytes hold consecutive runs of `width` codes, the first run in the lowest bits.
    """
    groups = to_blocks(field, width)
    mask = (1 << 8 // len(shifts)) - 1
    return torch.stack([groups >> shift & mask for shift in shifts], dim=-2).flatten(-3)


def signed(codes: Tensor, offset: int) -> Tensor:
    """Subtract an offset from uint8 codes: float32."""
    return (codes.to(torch.int8) - offset).float()


def scales_and_minima(field: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the eight scales and minima of 6 bits that Q4_K and Q5_K share.

    Four bytes hold the low bits of scales 0 to 3, four those of minima 0 to 3, each with two high
    bits of scale or minimum 4 to 7 above; four hold the low nibbles of scales and minima 4 to 7.

    field     uint8 [..., 12]
    Returns   float32 [..., 8, 1] for each
    """
    scale, minimum, low = fields(field, 4, 4, 4)
    scales = torch.cat((scale & 0x3F, low & 0xF | scale >> 2 & 0x30), dim=-1)
    minima = torch.cat((minimum & 0x3F, low >> 4 | minimum >> 2 & 0x30), dim=-1)
    return scales.float().unsqueeze(-1), minima.float().unsqueeze(-1)


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, or 0 where the scale is 0."""
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def extreme(blocks: Tensor) -> Tensor:
    """Return the value of the largest magnitude of each block, the first of several: [..., 1]."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


def pack_nibble_halves(codes: Tensor) -> Tensor:
    """Pack codes of a block, uint8 [..., 32], to [..., 16]: the first half is the low nibbles."""
    low, high = fields(codes, SMALL // 2, SMALL // 2)
    return low & 0xF | (high & 0xF) << 4


def pack_high_bits(codes: Tensor) -> Tensor:
    """Pack bit 4 of the codes of a block, uint8 [..., 32], to [..., 4], the lowest bit first."""
    high = to_blocks(codes >> 4, len(BITS))
    packed = torch.stack([high[..., bit] << bit for bit in BITS], dim=-1).sum(-1)
    return packed.to(torch.uint8)


def round_half_up(values: Tensor, largest: int) -> Tensor:
    """Round values >= 0 by adding 0.5 and dropping the fraction, up to `largest`: uint8."""
    return torch.trunc(values).clamp(max=largest).to(torch.uint8)
