"""Hadamard rotation and INT8 quantization of an input, in one pass."""
