"""Metrics against independent computations: scikit-image, flip-evaluator on files, SciPy, numpy."""

from functools import partial
from pathlib import Path

import flip_evaluator
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.data import astronaut, chelsea
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mezzotint.quality.metrics import st_lpips
from mezzotint.quality.metrics.image import (
    EQUAL_PSNR,
    IMAGE_METRICS,
    LATENT_METRICS,
    METRICS,
    flip_image,
    image_metrics,
    latent_metrics,
    stack,
    unavailable,
)

IMAGES = {"astronaut": astronaut()[:200, :256], "chelsea": chelsea()[:200, :256]}


def pair(name: str) -> tuple[Image.Image, Image.Image]:
    """A photograph, and the same with noise and a darker corner."""
    pixels = IMAGES[name]
    changed = pixels + np.random.default_rng(0).normal(0, 6, pixels.shape)
    changed[:64, :64] *= 0.7
    return Image.fromarray(pixels), Image.fromarray(np.clip(changed, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", IMAGES)
def test_psnr_and_ssim_are_those_of_scikit_image(name: str) -> None:
    reference, candidate = pair(name)
    r, c = np.asarray(reference), np.asarray(candidate)
    found = image_metrics([reference], [candidate], ["psnr", "ssim"])
    assert found["psnr"] == [pytest.approx(peak_signal_noise_ratio(r, c, data_range=255), rel=1e-6)]
    options = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "truncate": 3.5,
    }
    expected = structural_similarity(r, c, data_range=255, channel_axis=2, **options)
    assert found["ssim"] == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.parametrize("name", IMAGES)
def test_flip_is_that_of_flip_evaluator_on_files(tmp_path: Path, name: str) -> None:
    sides = pair(name)
    paths = [tmp_path / f"{side}.png" for side in "rc"]
    for image, path in zip(sides, paths, strict=True):
        image.save(path)
    error, mean, _ = flip_evaluator.evaluate(*map(str, paths), "LDR")
    assert image_metrics([sides[0]], [sides[1]], ["flip"])["flip"] == [
        pytest.approx(mean, rel=1e-5)
    ]
    heat = flip_image(*(stack([side])[0] for side in sides))
    assert np.abs(heat - error * 255).max() <= 0.51


def contrast_and_similarity(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The maps of one channel in 0..1, borders mirrored."""
    blur = partial(gaussian_filter, sigma=1.5, truncate=3.5, mode="mirror")
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, both = (
        blur(a * a) - mean_a**2,
        blur(b * b) - mean_b**2,
        blur(a * b) - mean_a * mean_b,
    )
    contrast = (2 * both + 0.03**2) / (var_a + var_b + 0.03**2)
    return contrast, contrast * (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)


def test_ms_ssim_is_the_product_over_five_scales() -> None:
    """Wang, Simoncelli, Bovik 2003: contrast and structure at four scales, SSIM at the fifth."""
    sides = [side.crop((0, 0, 192, 192)) for side in pair("astronaut")]
    planes = [np.asarray(side, float).transpose(2, 0, 1) / 255 for side in sides]
    expected = 1.0
    for weight in (0.0448, 0.2856, 0.3001, 0.2363):
        maps = [contrast_and_similarity(a, b)[0][5:-5, 5:-5] for a, b in zip(*planes, strict=True)]
        expected *= np.mean(maps) ** weight
        planes = [plane.reshape(3, len(plane[0]) // 2, 2, -1, 2).mean((2, 4)) for plane in planes]
    expected *= (
        np.mean([contrast_and_similarity(a, b)[1] for a, b in zip(*planes, strict=True)]) ** 0.1333
    )
    assert image_metrics([sides[0]], [sides[1]], ["ms_ssim"])["ms_ssim"] == [
        pytest.approx(expected, abs=1e-5)
    ]


@pytest.mark.parametrize("name", IMAGES)
def test_mae_is_in_levels(name: str) -> None:
    reference, candidate = pair(name)
    expected = np.abs(np.asarray(reference, float) - np.asarray(candidate, float)).mean()
    assert image_metrics([reference], [candidate], ["mae"])["mae"] == [pytest.approx(expected)]


def test_every_frame_has_its_number() -> None:
    (a, b), (c, d) = pair("astronaut"), pair("chelsea")
    both = image_metrics([a, c], [b, d], ["psnr", "flip"])
    alone = [image_metrics([r], [s], ["psnr", "flip"]) for r, s in ((a, b), (c, d))]
    assert both["psnr"] == pytest.approx([one["psnr"][0] for one in alone])
    assert both["flip"] == pytest.approx([one["flip"][0] for one in alone])


def test_equal_images_are_perfect() -> None:
    image = pair("chelsea")[0]
    found = image_metrics([image], [image], [metric.name for metric in IMAGE_METRICS])
    assert found["psnr"] == [EQUAL_PSNR]
    assert all(
        METRICS[name].distance(value) == pytest.approx(0, abs=1e-9)
        for name, (value,) in found.items()
    )


def test_what_cannot_be_computed_says_why() -> None:
    reasons = unavailable(["psnr", "ms_ssim", "lpips"], (64, 64))
    assert reasons["ms_ssim"] == "needs sides of 161 pixels or more, these are 64 x 64"
    assert "torchvision" in reasons["lpips"]
    small = Image.new("RGB", (64, 64))
    assert image_metrics([small], [small], ["psnr", "ms_ssim", "lpips"]).keys() == {"psnr"}


def pixels(seed: int, height: int, width: int, noise: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pixels, and the same with noise of so many levels."""
    random = np.random.default_rng(seed)
    a = random.integers(0, 256, (height, width, 3))
    return a.astype(np.uint8), np.clip(
        a + random.integers(-noise, noise + 1, a.shape), 0, 255
    ).astype(np.uint8)


def ramp(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    sides = (x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (height + width - 2))
    return np.stack(sides, -1).astype(np.uint8)


ST_LPIPS = {
    "noise": (pixels(0, 64, 64, 40), 0.00278105353936553),
    "faint noise, wide": (pixels(1, 48, 80, 8), 0.00014498806558549404),
    "shifted by a pixel, odd sides": (
        (ramp(97, 65), np.roll(ramp(97, 65), 1, 1)),
        0.021250013262033463,
    ),
    "inverted": ((ramp(64, 64), 255 - ramp(64, 64)), 0.8845146894454956),
}
"""{case: (pair, value)}, with values of stlpips-pytorch 0.0.2.

The call was `stlpips_pytorch.stlpips.LPIPS(net="alex", variant="shift_tolerant")` with
`normalize=True`, on a CPU with PyTorch 2.13.0, with empty modules in place of torchvision,
torchsummary and IPython, which the package imports but does not need for this network.
"""


@pytest.mark.parametrize("name", ST_LPIPS)
def test_st_lpips_is_that_of_the_packages_own_code(name: str) -> None:
    sides, expected = ST_LPIPS[name]
    images = [Image.fromarray(side) for side in sides]
    found = image_metrics([images[0]], [images[1]], ["st_lpips"])["st_lpips"]
    assert found == [pytest.approx(expected, rel=1e-4)]


def test_st_lpips_needs_its_weights_and_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unavailable(["st_lpips"], (21, 21)) == {}
    assert (
        unavailable(["st_lpips"], (20, 64))["st_lpips"]
        == "needs sides of 21 pixels or more, these are 20 x 64"
    )
    found = st_lpips._weights_file()
    for file, message in (
        (tmp_path / "none.pth", "does not exist"),
        (tmp_path / "other.pth", "differs"),
    ):
        (tmp_path / "other.pth").write_bytes(found.read_bytes()[:-1])
        st_lpips._weights.cache_clear()
        monkeypatch.setattr(st_lpips, "_weights_file", lambda file=file: file)
        assert message in unavailable(["st_lpips"], (64, 64))["st_lpips"]
    monkeypatch.undo()
    monkeypatch.setattr(st_lpips, "PACKAGE", "no-such-package")
    reason = unavailable(["st_lpips"], (64, 64))["st_lpips"]
    assert (
        reason == "needs the package no-such-package, which is not installed: "
        "pip install 'mezzotint[perceptual]'"
    )
    assert image_metrics(*[[Image.new("RGB", (64, 64))]] * 2, ["st_lpips"]) == {}
    monkeypatch.undo()
    st_lpips._weights.cache_clear()


def test_latents_are_compared_as_numpy_does() -> None:
    random = torch.Generator().manual_seed(0)
    a = torch.randn(1, 64, 16, generator=random).bfloat16()
    b = (a + 0.1 * torch.randn(1, 64, 16, generator=random)).bfloat16()
    r, c = (side.double().numpy().ravel() for side in (a, b))
    expected = {
        "latent_cosine": r @ c / np.linalg.norm(r) / np.linalg.norm(c),
        "latent_mae": np.abs(r - c).mean(),
        "latent_rmse": np.sqrt(((r - c) ** 2).mean()),
        "latent_max_abs": np.abs(r - c).max(),
        "latent_l2": np.linalg.norm(r - c),
    }
    assert latent_metrics(a, b) == pytest.approx(expected, rel=1e-12)
    assert [metric.name for metric in LATENT_METRICS] == list(expected)
