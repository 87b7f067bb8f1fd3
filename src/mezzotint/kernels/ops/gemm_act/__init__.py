"""GEMM of 8-bit codes with a fused activation and FP8 output, in CUDA C++ for Hopper."""
