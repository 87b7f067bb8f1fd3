"""Metrics against their definitions, computed independently."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.quality import latent_cosine, picture_psnr, picture_ssim


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_psnr_is_that_of_numpy_averaged_over_pictures() -> None:
    pairs = [(picture(0), picture(1)), (picture(2), picture(3))]
    errors = [np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2) for a, b in pairs]
    expected = np.mean([10 * math.log10(255**2 / error) for error in errors])
    assert picture_psnr([a for a, _ in pairs], [b for _, b in pairs]) == pytest.approx(expected, rel=1e-5)


def test_equal_pictures_are_perfect() -> None:
    assert picture_psnr([picture(0)], [picture(0)]) == math.inf
    assert picture_ssim([picture(0)], [picture(0)]) == pytest.approx(1)
    assert picture_ssim([picture(0)], [picture(1)]) < 0.1


def test_cosine_of_latents() -> None:
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert latent_cosine(a, b) == pytest.approx(24 / 25)
    assert latent_cosine(a, -a) == pytest.approx(-1)
