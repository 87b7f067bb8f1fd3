"""Dequantize a matrix of GGUF blocks to the dtype of the GEMM that follows."""
