"""Metrics of images, videos and latents."""
