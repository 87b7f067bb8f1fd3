"""Unpack 4-bit codes to the INT8 matrix that they stand for."""
