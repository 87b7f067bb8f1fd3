"""Dequantize codes with scales in a tensor of their own: a thread decodes eight weights at a time.

Eight codes of n bits are n bytes. A matrix is a sequence of such runs, and a scale belongs to a
fixed number of consecutive runs: those of a group, of a row or of the whole matrix.
"""

import triton
import triton.language as tl

from mezzotint.kernels.ops.dequant_groups import kinds

CODEBOOK, E2M1 = tl.constexpr(kinds.CODEBOOK), tl.constexpr(kinds.E2M1)
INT8, E4M3, E5M2 = (tl.constexpr(kind) for kind in (kinds.INT8, kinds.E4M3, kinds.E5M2))
E8M0_SCALE, E4M3_SCALE = tl.constexpr(kinds.E8M0_SCALE), tl.constexpr(kinds.E4M3_SCALE)
ZERO_POINT, OFFSET = tl.constexpr(kinds.ZERO_POINT), tl.constexpr(kinds.OFFSET)
FUSED_OFFSET = tl.constexpr(kinds.FUSED_OFFSET)


@triton.jit
def _dequant_groups_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    outer_ptr,
    codebook_ptr,
    out_ptr,
    runs,
    CODES: tl.constexpr,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_RUNS: tl.constexpr,
    ZERO: tl.constexpr,
    OUTER_RUNS: tl.constexpr,
    FACTOR: tl.constexpr,
    TILE: tl.constexpr,
):
    run = tl.program_id(0) * TILE + tl.arange(0, TILE)
    # The threads after the last run decode it again, so that no load needs a mask.
    loaded = tl.minimum(run, runs - 1)
    # 64 bits, because a large matrix has more than 2^31 bytes.
    packed = codes_ptr + loaded.to(tl.int64) * BITS
    values = _values(packed, codebook_ptr, CODES, BITS)
    group = loaded // SCALE_RUNS
    scale = _scale(scale_ptr + group, SCALES)
    if OUTER_RUNS:
        scale *= tl.load(outer_ptr + loaded // OUTER_RUNS).to(tl.float32)
    if ZERO == ZERO_POINT:
        values -= tl.load(zero_ptr + group).to(tl.float32)[:, None]
    else:
        values -= MIDDLE
    if ZERO == FUSED_OFFSET:
        zero = tl.load(zero_ptr + group).to(tl.float32)
        values = tl.fma(values, scale[:, None], zero[:, None])
    else:
        values *= scale[:, None]
    if ZERO == OFFSET:
        values += tl.load(zero_ptr + group).to(tl.float32)[:, None]
    if FACTOR != 1:
        values *= FACTOR
    out = out_ptr + run[:, None].to(tl.int64) * 8 + tl.arange(0, 8)[None, :]
    tl.store(out, values.to(out_ptr.dtype.element_ty), (run < runs)[:, None])


@triton.jit
def _values(packed, codebook_ptr, CODES: tl.constexpr, BITS: tl.constexpr):
    """Return what eight codes of each run stand for, float32 [TILE, 8]."""
    if BITS < 8:
        codes = _unpacked(packed, BITS)
    else:
        codes = tl.load(packed[:, None] + tl.arange(0, 8)[None, :])
    if CODES == CODEBOOK:
        return tl.load(codebook_ptr + codes)
    if CODES == E2M1:
        # A float16 of these bits is too small by 2^14, because its exponent's bias is 15, not 1.
        return _from_half_bits((codes & 7) << 9 | (codes & 8) << 12) * 16384.0
    if CODES == INT8:
        return codes.to(tl.int8, bitcast=True).to(tl.float32)
    if CODES == E4M3:
        return _e4m3(codes.to(tl.int32))
    if CODES == E5M2:
        return _from_half_bits(codes.to(tl.int32) << 8)
    return codes.to(tl.float32)


@triton.jit
def _unpacked(packed, BITS: tl.constexpr):
    """Unpack eight codes of each run, lowest bits first, int32 [TILE, 8]."""
    word = tl.load(packed).to(tl.int64 if BITS > 4 else tl.int32)
    for byte in tl.static_range(1, BITS):
        word |= tl.load(packed + byte).to(word.dtype) << (8 * byte)
    shift = (tl.arange(0, 8) * BITS).to(word.dtype)
    return (word[:, None] >> shift[None, :]).to(tl.int32) & ((1 << BITS) - 1)


@triton.jit
def _scale(address, SCALES: tl.constexpr):
    """Load the scale of each run, float32 [TILE]."""
    scale = tl.load(address)
    if SCALES == E8M0_SCALE:
        exponent = scale.to(tl.int32)
        # The smallest power is subnormal in float32, and the largest code is NaN.
        bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
        return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    if SCALES == E4M3_SCALE:
        return _e4m3(scale.to(tl.int32))
    return scale.to(tl.float32)


@triton.jit
def _e4m3(codes):
    """Convert e4m3 codes (int32) to float32, also on GPUs that have no such dtype."""
    # A float16 of these bits is too small by 2^8, because its exponent's bias is 15, not 7.
    values = _from_half_bits((codes & 0x80) << 8 | (codes & 0x7F) << 7) * 256.0
    return tl.where((codes & 0x7F) == 0x7F, float("nan"), values)


@triton.jit
def _from_half_bits(bits):
    """Convert float16 numbers, given as int32, to float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
