"""Dequantize a matrix whose scales are in a tensor of their own, to the dtype of the GEMM."""
