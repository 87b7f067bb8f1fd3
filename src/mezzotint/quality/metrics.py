"""Numbers that compare a candidate with its reference."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def latent_cosine(reference: Tensor, candidate: Tensor) -> float:
    """Cosine of two latent tensors of the same shape, flattened, in float64."""
    return F.cosine_similarity(reference.double().flatten(), candidate.double().flatten(), dim=0).item()


def picture_psnr(reference: Sequence[Image], candidate: Sequence[Image]) -> float:
    """Mean over the pictures of the peak signal-to-noise ratio in dB, for 8-bit RGB; inf where all are equal."""
    pairs = zip(_stack(reference), _stack(candidate), strict=True)
    return float(torch.stack([peak_signal_noise_ratio(c, r, data_range=1.0) for r, c in pairs]).mean())


def picture_ssim(reference: Sequence[Image], candidate: Sequence[Image]) -> float:
    """Mean structural similarity of the pictures (Gaussian window of 11, sigma 1.5), for 8-bit RGB."""
    return float(structural_similarity_index_measure(_stack(candidate), _stack(reference), data_range=1.0))


def _stack(pictures: Sequence[Image]) -> Tensor:
    """[n, 3, height, width] in 0..1."""
    arrays = [np.array(picture.convert("RGB"), dtype=np.float64) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
