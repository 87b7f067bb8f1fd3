"""4-bit matrix to FP8 matrix, for the GEMM that follows at once."""
