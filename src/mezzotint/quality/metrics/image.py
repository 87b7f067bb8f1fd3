"""Metrics between a candidate and its reference, of latents at each step and of images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from mezzotint.quality.metrics import st_lpips

EQUAL_PSNR = 120.0
"""PSNR in dB of equal images, which is infinite in theory. One value of a 2048 x 2048 image that
differs by one level gives 119 dB."""
WINDOW = 11
"""Width of the SSIM window in pixels."""
MS_SSIM_MIN_SIDE = 16 * (WINDOW - 1) + 1
"""Smallest side, in pixels, for MS-SSIM: the window must fit after four reductions by half."""


@dataclass(frozen=True)
class Metric:
    """One metric of an image or of a step's latents.

    higher_is_better   whether larger values are nearer to the reference
    distance           function from the value to a distance, which is 0 for equal inputs
    digits             decimals in printed values
    """

    name: str
    title: str
    higher_is_better: bool
    distance: Callable[[float], float]
    digits: int
    unit: str = ""


def _one_minus(value: float) -> float:
    return 1.0 - value


def _identity(value: float) -> float:
    return value


def _rms_of_decibels(value: float) -> float:
    return 0.0 if value >= EQUAL_PSNR else float(10 ** (-value / 20))


LATENT_METRICS = (
    Metric("latent_cosine", "latent cosine", True, _one_minus, 5),
    Metric("latent_mae", "latent MAE", False, _identity, 4),
    Metric("latent_rmse", "latent RMSE", False, _identity, 4),
    Metric("latent_max_abs", "latent max abs", False, _identity, 3),
    Metric("latent_l2", "latent L2", False, _identity, 2),
)
IMAGE_METRICS = (
    Metric("psnr", "PSNR", True, _rms_of_decibels, 1, "dB"),
    Metric("ssim", "SSIM", True, _one_minus, 4),
    Metric("ms_ssim", "MS-SSIM", True, _one_minus, 4),
    Metric("flip", "FLIP", False, _identity, 4),
    Metric("st_lpips", "ST-LPIPS", False, _identity, 5),
    Metric("lpips", "LPIPS", False, _identity, 4),
    Metric("mae", "MAE", False, _identity, 2, "of 255"),
)
LAST_STEP_SUFFIX = "_last"
METRICS: Mapping[str, Metric] = {
    **{metric.name + LAST_STEP_SUFFIX: metric for metric in LATENT_METRICS},
    **{metric.name: metric for metric in IMAGE_METRICS},
}
"""{name in a report: metric}. Latent metrics are those of the last step."""


def latent_metrics(reference: Tensor, candidate: Tensor) -> dict[str, float]:
    """Compute all LATENT_METRICS of two tensors of the same shape, in float64.

    The cosine is 0 if one of the tensors is 0.
    """
    r, c = reference.double().flatten(), candidate.double().flatten()
    difference = c - r
    return {
        "latent_cosine": latent_cosine(r, c),
        "latent_mae": difference.abs().mean().item(),
        "latent_rmse": difference.square().mean().sqrt().item(),
        "latent_max_abs": difference.abs().max().item(),
        "latent_l2": difference.norm().item(),
    }


def latent_cosine(reference: Tensor, candidate: Tensor) -> float:
    """Return the cosine of two flattened latent tensors of the same shape, in float64."""
    return F.cosine_similarity(
        reference.double().flatten(), candidate.double().flatten(), dim=0
    ).item()


def image_metrics(
    reference: Sequence[Image], candidate: Sequence[Image], names: Sequence[str]
) -> dict[str, list[float]]:
    """Compute the named metrics, except unavailable ones, as {metric: one value per frame}."""
    r, c = stack(reference), stack(candidate)
    reasons = unavailable(names, reference[0].size)
    return {name: FRAME_METRICS[name](r, c).tolist() for name in names if name not in reasons}


def unavailable(names: Sequence[str], size: tuple[int, int]) -> dict[str, str]:
    """Return {metric: why it cannot be computed} for images of this width and height."""
    checks: dict[str, Callable[[], str]] = {
        "ms_ssim": lambda: _too_small(size, MS_SSIM_MIN_SIDE),
        "st_lpips": lambda: _too_small(size, st_lpips.MIN_SIDE) or st_lpips.unavailable_because(),
        "lpips": _lpips_unavailable,
    }
    reasons = {name: check() for name, check in checks.items() if name in names}
    return {name: reason for name, reason in reasons.items() if reason}


def _too_small(size: tuple[int, int], min_side: int) -> str:
    if min(size) >= min_side:
        return ""
    return f"needs sides of {min_side} pixels or more, these are {size[0]} x {size[1]}"


@cache
def _lpips_unavailable() -> str:
    """Return why LPIPS cannot be computed, or an empty string.

    torchmetrics gets AlexNet and its weights from torchvision.
    """
    if find_spec("torchvision") is None:
        return "needs AlexNet of torchvision, which is not installed"
    try:
        _lpips(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))
    except OSError as error:
        return f"the weights of AlexNet cannot be downloaded: {error}"
    return ""


def stack(images: Sequence[Image]) -> Tensor:
    """Return 8-bit images of the same size as float64 [n, 3, height, width] in 0..1."""
    arrays = [np.array(image.convert("RGB"), dtype=np.float64) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def psnr(reference: Tensor, candidate: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, [n]; EQUAL_PSNR for equal images."""
    pairs = zip(candidate, reference, strict=True)
    return torch.stack([peak_signal_noise_ratio(c, r, data_range=1.0) for c, r in pairs]).clamp(
        max=EQUAL_PSNR
    )


def ssim(reference: Tensor, candidate: Tensor) -> Tensor:
    """Return the structural similarity, [n], with a Gaussian window of 11 pixels and sigma 1.5."""
    options = {"data_range": 1.0, "reduction": "none", "return_full_image": True}
    _, similarity = structural_similarity_index_measure(candidate, reference, **options)
    # torchmetrics pads the border. Wang et al. (2004) and scikit-image use only positions where the
    # window lies inside the image.
    edge = WINDOW // 2
    interior: Tensor = similarity[..., edge:-edge, edge:-edge]
    return interior.mean(dim=(1, 2, 3))


def _ms_ssim(reference: Tensor, candidate: Tensor) -> Tensor:
    """Return the structural similarity over five scales, [n]."""
    result: Tensor = multiscale_structural_similarity_index_measure(
        candidate, reference, data_range=1.0, reduction="none"
    )
    return result.reshape(-1)


def _mae(reference: Tensor, candidate: Tensor) -> Tensor:
    """Return the mean absolute difference in 8-bit levels, [n]."""
    return (candidate - reference).abs().mean(dim=(1, 2, 3)) * 255


def _flip(reference: Tensor, candidate: Tensor) -> Tensor:
    """Return the mean FLIP error in 0..1 at 67 pixels per degree, [n]."""
    pairs = zip(reference, candidate, strict=True)
    return torch.tensor([_flip_map(r, c, magma=False)[1] for r, c in pairs], dtype=torch.float64)


def flip_image(reference: Tensor, candidate: Tensor) -> np.ndarray:
    """Return the FLIP error per pixel in the magma color map, uint8 [height, width, 3].

    reference, candidate   [3, height, width] in 0..1
    """
    colors = _flip_map(reference, candidate, magma=True)[0]
    return (colors * 255).round().astype(np.uint8)


def _flip_map(reference: Tensor, candidate: Tensor, magma: bool) -> tuple[np.ndarray, float]:
    import flip_evaluator

    pixels = [
        np.ascontiguousarray(image.permute(1, 2, 0).numpy(), dtype=np.float32)
        for image in (reference, candidate)
    ]
    error, mean, _ = flip_evaluator.evaluate(*pixels, "LDR", applyMagma=magma)
    return error, float(mean)


def _lpips(reference: Tensor, candidate: Tensor) -> Tensor:
    """Return the learned perceptual distance based on AlexNet, [n]."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as distance

    pairs = zip(candidate.float(), reference.float(), strict=True)
    return torch.stack(
        [distance(c[None], r[None], net_type="alex", normalize=True) for c, r in pairs]
    )


FRAME_METRICS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "psnr": psnr,
    "ssim": ssim,
    "ms_ssim": _ms_ssim,
    "flip": _flip,
    "st_lpips": st_lpips.st_lpips,
    "lpips": _lpips,
    "mae": _mae,
}
