"""Comparison of quantized models with their reference: metrics, reports, diagnosis, sensitivity.

This file imports nothing, because the CLI reads `source_spec` before PyTorch is imported.
"""
