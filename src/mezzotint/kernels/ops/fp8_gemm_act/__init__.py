"""FP8 GEMM with a fused activation and FP8 output, in CUDA C++ for Hopper."""
