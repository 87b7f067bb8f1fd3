"""Dequantize a 4-bit matrix to FP8 for the GEMM that follows."""
