"""Numbers that compare a candidate with its reference: latents at each step, and pictures or frames."""

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

from mezzotint.quality import perceptual

EQUAL_PSNR = 120.0
"""dB given to equal pictures, whose ratio is infinite; one level in one value of a 2048 x 2048 picture is 119 dB."""
WINDOW = 11
"""Pixels across the window of SSIM."""
MS_SSIM_SMALLEST = 16 * (WINDOW - 1) + 1
"""Five scales of that window."""


@dataclass(frozen=True)
class Metric:
    """One number for a picture or a step.

    higher     whether higher is nearer to the reference
    distance   the number as a distance that is 0 where both are equal
    digits     after the point, where it is printed
    """

    name: str
    title: str
    higher: bool
    distance: Callable[[float], float]
    digits: int
    unit: str = ""


def _from_one(value: float) -> float:
    return 1.0 - value


def _itself(value: float) -> float:
    return value


def _rms_of_decibels(value: float) -> float:
    return 0.0 if value >= EQUAL_PSNR else float(10 ** (-value / 20))


LATENT_METRICS = (
    Metric("latent_cosine", "latent cosine", True, _from_one, 5),
    Metric("latent_mae", "latent MAE", False, _itself, 4),
    Metric("latent_rmse", "latent RMSE", False, _itself, 4),
    Metric("latent_max_abs", "latent max abs", False, _itself, 3),
    Metric("latent_l2", "latent L2", False, _itself, 2),
)
PICTURE_METRICS = (
    Metric("psnr", "PSNR", True, _rms_of_decibels, 1, "dB"),
    Metric("ssim", "SSIM", True, _from_one, 4),
    Metric("ms_ssim", "MS-SSIM", True, _from_one, 4),
    Metric("flip", "FLIP", False, _itself, 4),
    Metric("st_lpips", "ST-LPIPS", False, _itself, 5),
    Metric("lpips", "LPIPS", False, _itself, 4),
    Metric("mae", "MAE", False, _itself, 2, "of 255"),
)
LAST = "_last"
METRICS: Mapping[str, Metric] = {
    **{metric.name + LAST: metric for metric in LATENT_METRICS},
    **{metric.name: metric for metric in PICTURE_METRICS},
}
"""{name in a report: metric}; those of latents are of the last step."""


def latent_metrics(reference: Tensor, candidate: Tensor) -> dict[str, float]:
    """Every metric of LATENT_METRICS between two latent tensors of one shape, in float64; cosine 0 if one is 0."""
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
    """Cosine of two latent tensors of the same shape, flattened, in float64."""
    return F.cosine_similarity(reference.double().flatten(), candidate.double().flatten(), dim=0).item()


def picture_metrics(
    reference: Sequence[Image], candidate: Sequence[Image], names: Sequence[str]
) -> dict[str, list[float]]:
    """{metric: one number a frame} of those named that can be computed; see `unavailable`."""
    r, c = stack(reference), stack(candidate)
    reasons = unavailable(names, reference[0].size)
    return {name: FRAME_METRICS[name](r, c).tolist() for name in names if name not in reasons}


def unavailable(names: Sequence[str], size: tuple[int, int]) -> dict[str, str]:
    """{metric: why it cannot be computed} for pictures of this width and height."""
    needs: dict[str, Callable[[], str]] = {
        "ms_ssim": lambda: _without_sides(size, MS_SSIM_SMALLEST),
        "st_lpips": lambda: _without_sides(size, perceptual.SMALLEST) or perceptual.unavailable_because(),
        "lpips": _without_lpips,
    }
    reasons: dict[str, str] = {name: why() for name, why in needs.items() if name in names}
    return {name: reason for name, reason in reasons.items() if reason}


def _without_sides(size: tuple[int, int], smallest: int) -> str:
    small = min(size) < smallest
    return f"needs sides of {smallest} pixels or more, these are {size[0]} x {size[1]}" if small else ""


@cache
def _without_lpips() -> str:
    """Why LPIPS cannot be had here, or nothing: torchmetrics takes AlexNet and its weights from torchvision."""
    if find_spec("torchvision") is None:
        return "needs torchvision, whose AlexNet it is made of; it is not installed"
    try:
        _lpips(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))
    except OSError as error:
        return f"the weights of AlexNet cannot be downloaded: {error}"
    return ""


def stack(pictures: Sequence[Image]) -> Tensor:
    """8-bit pictures of one size as float64 [n, 3, height, width] in 0..1."""
    arrays = [np.array(picture.convert("RGB"), dtype=np.float64) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def psnr(reference: Tensor, candidate: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [n]; EQUAL_PSNR where pictures are equal."""
    pairs = zip(candidate, reference, strict=True)
    return torch.stack([peak_signal_noise_ratio(c, r, data_range=1.0) for c, r in pairs]).clamp(max=EQUAL_PSNR)


def ssim(reference: Tensor, candidate: Tensor) -> Tensor:
    """Structural similarity, Gaussian window of 11 pixels, sigma 1.5, [n]; where the window is whole, as Wang et al.
    (2004) and scikit-image have it."""
    options = {"data_range": 1.0, "reduction": "none", "return_full_image": True}
    _, similarity = structural_similarity_index_measure(candidate, reference, **options)
    edge = WINDOW // 2
    whole: Tensor = similarity[..., edge:-edge, edge:-edge]
    return whole.mean(dim=(1, 2, 3))


def _ms_ssim(reference: Tensor, candidate: Tensor) -> Tensor:
    """Structural similarity at five scales, [n]."""
    result: Tensor = multiscale_structural_similarity_index_measure(
        candidate, reference, data_range=1.0, reduction="none"
    )
    return result.reshape(-1)


def _mae(reference: Tensor, candidate: Tensor) -> Tensor:
    """Mean absolute difference in 8-bit levels, [n]."""
    return (candidate - reference).abs().mean(dim=(1, 2, 3)) * 255


def _flip(reference: Tensor, candidate: Tensor) -> Tensor:
    """Mean FLIP error in 0..1 at 67 pixels per degree, [n]."""
    pairs = zip(reference, candidate, strict=True)
    return torch.tensor([_flip_map(r, c, magma=False)[1] for r, c in pairs], dtype=torch.float64)


def flip_picture(reference: Tensor, candidate: Tensor) -> np.ndarray:
    """The FLIP error of each pixel in the colours of magma, uint8 [height, width, 3]; both are [3, height, width]."""
    colours = _flip_map(reference, candidate, magma=True)[0]
    return (colours * 255).round().astype(np.uint8)


def _flip_map(reference: Tensor, candidate: Tensor, magma: bool) -> tuple[np.ndarray, float]:
    import flip_evaluator

    pixels = [np.ascontiguousarray(side.permute(1, 2, 0).numpy(), dtype=np.float32) for side in (reference, candidate)]
    error, mean, _ = flip_evaluator.evaluate(*pixels, "LDR", applyMagma=magma)
    return error, float(mean)


def _lpips(reference: Tensor, candidate: Tensor) -> Tensor:
    """Learned perceptual distance on AlexNet, [n]."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as distance

    pairs = zip(candidate.float(), reference.float(), strict=True)
    return torch.stack([distance(c[None], r[None], net_type="alex", normalize=True) for c, r in pairs])


FRAME_METRICS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "psnr": psnr,
    "ssim": ssim,
    "ms_ssim": _ms_ssim,
    "flip": _flip,
    "st_lpips": perceptual.st_lpips,
    "lpips": _lpips,
    "mae": _mae,
}
