"""Activation, Hadamard rotation and INT8 quantization in one pass, in CUDA C++."""
