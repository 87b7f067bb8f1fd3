"""Kinds of operands of `dequant_groups`, without an import of Triton."""

import torch

PACKED, CODEBOOK, E2M1, INT8, E4M3, E5M2 = range(6)
"""Codes: unsigned of 2 to 8 bits, 4 bits that index a table, E2M1, and three of 8 bits."""
FLOAT, E8M0_SCALE, E4M3_SCALE = range(3)
"""Scales: numbers that every GPU can load, and 8-bit floats that the kernel decodes."""
NO_ZERO, ZERO_POINT, OFFSET, FUSED_OFFSET = range(4)
"""Zeros: none, subtracted from the codes, or added after the scale.

FUSED_OFFSET rounds once, like a fused multiply-add. OFFSET rounds the scaled code first.
"""
CODE_KINDS = {
    torch.uint8: PACKED,
    torch.int8: INT8,
    torch.float8_e4m3fn: E4M3,
    torch.float8_e5m2: E5M2,
}
SCALE_KINDS = {torch.float8_e8m0fnu: E8M0_SCALE, torch.float8_e4m3fn: E4M3_SCALE}
"""{dtype: kind}; scales of other dtypes are FLOAT."""
