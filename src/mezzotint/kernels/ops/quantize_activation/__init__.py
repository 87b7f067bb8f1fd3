"""Activation functions and quantization to FP8 in one pass."""
