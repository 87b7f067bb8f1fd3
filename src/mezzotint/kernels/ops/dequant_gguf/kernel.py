"""Dequantize GGUF blocks: a thread decodes eight consecutive weights at a time.

Eight weights share a scale in every type, their codes are in consecutive bytes, and 16 bytes of
BF16 are the longest store of a thread. `mezzotint.schemes.gguf_*` describe the blocks.

The functions share these arguments:

block    address of the block of each run of eight weights [TILE]
first    number of the run's first weight in its block [TILE]
"""

import triton
import triton.language as tl

Q4_0, Q4_1 = tl.constexpr(2), tl.constexpr(3)
Q5_0, Q5_1, Q8_0 = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
Q2_K, Q3_K, Q4_K = tl.constexpr(10), tl.constexpr(11), tl.constexpr(12)
Q5_K, Q6_K = tl.constexpr(13), tl.constexpr(14)
IQ4_NL, IQ4_XS = tl.constexpr(20), tl.constexpr(23)


@triton.jit
def _dequant_gguf_kernel(
    codes_ptr,
    codebook_ptr,
    out_ptr,
    runs,
    TYPE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    TILE: tl.constexpr,
):
    run = tl.program_id(0) * TILE + tl.arange(0, TILE)
    # The threads after the last run decode it again, so that no load needs a mask.
    loaded = tl.minimum(run, runs - 1)
    # 64 bits, because a large matrix has more than 2^31 bytes.
    block = codes_ptr + (loaded // (GROUP // 8)).to(tl.int64) * BLOCK_BYTES
    values = _decode(block, loaded % (GROUP // 8) * 8, codebook_ptr, TYPE)
    out = out_ptr + run[:, None].to(tl.int64) * 8 + tl.arange(0, 8)[None, :]
    tl.store(out, values.to(out_ptr.dtype.element_ty), (run < runs)[:, None])


@triton.jit
def _decode(block, first, codebook_ptr, TYPE: tl.constexpr):
    """Return the weights of each run, float32 [TILE, 8]."""
    if TYPE == Q8_0:
        values = _signed_bytes(block + 2, first) * _half(block)[:, None]
    elif TYPE == Q4_0:
        values = (_codes(block + 2, first, 16, 4) - 8).to(tl.float32) * _half(block)[:, None]
    elif TYPE == Q4_1:
        values = _above_minimum(block, _codes(block + 4, first, 16, 4))
    elif TYPE == Q5_0:
        codes = _codes(block + 6, first, 16, 4) | _fifth_bits(block + 2, first)
        values = (codes - 16).to(tl.float32) * _half(block)[:, None]
    elif TYPE == Q5_1:
        codes = _codes(block + 8, first, 16, 4) | _fifth_bits(block + 4, first)
        values = _above_minimum(block, codes)
    elif TYPE == IQ4_NL:
        values = tl.load(codebook_ptr + _codes(block + 2, first, 16, 4)) * _half(block)[:, None]
    else:
        values = _decode_large(block, first, codebook_ptr, TYPE)
    return values


@triton.jit
def _decode_large(block, first, codebook_ptr, TYPE: tl.constexpr):
    """Return the weights of blocks of 256, whose groups have scales of their own."""
    if TYPE == Q2_K:
        group = tl.load(block + first // 16)
        scale, minimum = (group & 0xF).to(tl.float32), (group >> 4).to(tl.float32)
        codes = _codes(block + 16, first, 32, 2)
        values = _scaled(codes, _half(block + 80) * scale, _half(block + 82) * minimum)
    elif TYPE == Q3_K:
        scale = _code(block + 96, first // 16, 8, 4) | _code(block + 104, first // 16, 4, 2) << 4
        unit = _half(block + 108) * (scale - 32).to(tl.float32)
        minus = (_codes(block, first, 32, 1) ^ 1) << 2
        values = (_codes(block + 32, first, 32, 2) - minus).to(tl.float32) * unit[:, None]
    elif TYPE == Q4_K:
        values = _scaled(_codes(block + 16, first, 32, 4), *_scale_and_minimum(block, first // 32))
    elif TYPE == Q5_K:
        codes = _codes(block + 48, first, 32, 4) | _codes(block + 16, first, 32, 1) << 4
        values = _scaled(codes, *_scale_and_minimum(block, first // 32))
    elif TYPE == Q6_K:
        codes = _codes(block, first, 64, 4) | _codes(block + 128, first, 32, 2) << 4
        group = tl.load(block + 192 + first // 16).to(tl.int8, bitcast=True)
        unit = _half(block + 208) * group.to(tl.float32)
        values = (codes - 32).to(tl.float32) * unit[:, None]
    else:
        tl.static_assert(TYPE == IQ4_XS)
        scale = _code(block + 4, first // 32, 1, 4) | _code(block + 2, first // 32, 1, 2) << 4
        unit = _half(block) * (scale - 32).to(tl.float32)
        values = tl.load(codebook_ptr + _codes(block + 8, first, 16, 4)) * unit[:, None]
    return values


@triton.jit
def _above_minimum(block, codes):
    """Return code * scale + minimum of Q4_1 and Q5_1."""
    return _scaled(codes, _half(block), -_half(block + 2))


@triton.jit
def _scaled(codes, unit, minimum):
    """Return code * unit - minimum, float32 [TILE, 8].

    The product is exact in float32, so that a fused multiply-add gives the same number.
    """
    return codes.to(tl.float32) * unit[:, None] - minimum[:, None]


@triton.jit
def _scale_and_minimum(block, group):
    """Return the scale and minimum of groups of Q4_K and Q5_K; see `scales_and_minima`."""
    field = block + 4 + group % 4
    low_scale, low_minimum = tl.load(field).to(tl.int32), tl.load(field + 4).to(tl.int32)
    nibbles = tl.load(field + 8).to(tl.int32)
    scale = tl.where(group < 4, low_scale & 0x3F, nibbles & 0xF | low_scale >> 2 & 0x30)
    minimum = tl.where(group < 4, low_minimum & 0x3F, nibbles >> 4 | low_minimum >> 2 & 0x30)
    return _half(block) * scale.to(tl.float32), _half(block + 2) * minimum.to(tl.float32)


@triton.jit
def _half(address):
    """Load a float16 number of each run, as float32 [TILE]."""
    return tl.load(address.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _signed_bytes(field, first):
    """Load eight signed bytes of each run, as float32 [TILE, 8]."""
    packed = tl.load((field + first)[:, None] + tl.arange(0, 8)[None, :])
    return packed.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _codes(field, first, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Load eight codes of each run, int32 [TILE, 8]; WIDTH is a multiple of 8.

    Every WIDTH bytes hold consecutive runs of WIDTH codes, the first run in the lowest bits.
    """
    byte, shift = _place(first, WIDTH, BITS)
    packed = tl.load((field + byte)[:, None] + tl.arange(0, 8)[None, :]).to(tl.int32)
    return packed >> shift[:, None] & ((1 << BITS) - 1)


@triton.jit
def _code(field, index, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Load one code of each run, int32 [TILE], packed as for `_codes`."""
    byte, shift = _place(index, WIDTH, BITS)
    return tl.load(field + byte).to(tl.int32) >> shift & ((1 << BITS) - 1)


@triton.jit
def _place(index, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Return the byte and the lowest bit of a code."""
    runs_per_byte: tl.constexpr = 8 // BITS
    byte = index // (WIDTH * runs_per_byte) * WIDTH + index % WIDTH
    return byte, index // WIDTH % runs_per_byte * BITS


@triton.jit
def _fifth_bits(field, first):
    """Load the upper bit of eight codes of 5 bits, which are one byte: 0 or 16, int32 [TILE, 8]."""
    byte = tl.load(field + first // 8).to(tl.int32)
    return (byte[:, None] >> tl.arange(0, 8)[None, :] & 1) << 4
