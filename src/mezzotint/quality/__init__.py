"""How close a quantized model's latents and pictures are to the reference's."""

from mezzotint.quality.metrics import latent_cosine

__all__ = ["latent_cosine"]
