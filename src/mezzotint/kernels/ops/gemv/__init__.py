"""Multiply a 4-bit matrix by a few vectors, for layers that are bound by memory."""
