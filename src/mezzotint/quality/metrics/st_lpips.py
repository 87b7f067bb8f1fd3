"""ST-LPIPS, a learned distance between images that tolerates shifts (Ghildyal and Liu, ECCV 2022).

The package stlpips-pytorch (extra `perceptual`) provides the trained weights. Its code is not
imported, because it needs torchvision and undeclared packages. This module defines the network: an
AlexNet with stride 1 and a blur before each reduction. Features are normalized to length 1 at each
pixel. Their squared differences are weighted by channel, averaged over pixels and summed over the
five layers.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.errors import Unsupported

PACKAGE = "stlpips-pytorch"
WEIGHTS = "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth"
SHA256 = "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"
"""SHA-256 of the weights in version 0.0.2. The limits of the gates hold for these weights only."""
MIN_SIDE = 21
"""Smallest side in pixels. With less, the last feature map is smaller than the mirrored border."""
EPSILON = 1e-10

Weights = Mapping[str, Tensor]
"""{name in the file: float32 tensor}"""


def st_lpips(reference: Tensor, candidate: Tensor) -> Tensor:
    """Return the distance of each pair of images, float64 [n]; 0 for equal images.

    reference, candidate   [n, 3, height, width] in 0..1, with sides of at least MIN_SIDE
    Raises                 Unsupported if the weights are not available
    """
    weights = _weights()
    pairs = zip(reference.float(), candidate.float(), strict=True)
    with torch.inference_mode():
        return torch.tensor(
            [_distance(weights, r[None], c[None]) for r, c in pairs], dtype=torch.float64
        )


def unavailable_because() -> str:
    """Return why the weights are not available, or an empty string."""
    try:
        _weights()
    except Unsupported as error:
        return error.message
    return ""


def _distance(weights: Weights, reference: Tensor, candidate: Tensor) -> float:
    layers = zip(_features(weights, reference), _features(weights, candidate), strict=True)
    return sum(
        float(F.conv2d((r - c).square(), weights[f"lin{number}.model.1.weight"]).mean())
        for number, (r, c) in enumerate(layers)
    )


def _features(weights: Weights, image: Tensor) -> Iterator[Tensor]:
    """Yield the outputs of the five layers, [1, channels, height, width], normalized per pixel."""
    x = (2 * image - 1 - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
    x = F.relu(_blur_and_halve(_convolve(weights, "net.slice1.0", x, padding=2)))
    yield _normalize(x)
    x = F.relu(_convolve(weights, "net.slice2.5", _pool(x), padding=2))
    yield _normalize(x)
    x = F.relu(_convolve(weights, "net.slice3.9", _pool(x), padding=1))
    yield _normalize(x)
    for name in ("net.slice4.11", "net.slice5.13"):
        x = F.relu(_convolve(weights, name, x, padding=1))
        yield _normalize(x)


def _convolve(weights: Weights, name: str, x: Tensor, padding: int) -> Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)


def _pool(x: Tensor) -> Tensor:
    return _blur_and_halve(F.max_pool2d(x, kernel_size=3, stride=1))


def _blur_and_halve(x: Tensor) -> Tensor:
    """Blur with (1 2 1) / 4 in both directions and keep every second pixel.

    The border is padded with two mirrored pixels.
    """
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(line, line).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def _normalize(x: Tensor) -> Tensor:
    length: Tensor = x.square().sum(dim=1, keepdim=True).sqrt()
    return x / (length + EPSILON)


@cache
def _weights() -> Weights:
    """Load the weights from the package.

    Raises   Unsupported if the package is not installed, or its file is missing or different
    """
    path = _weights_file()
    if not path.is_file():
        raise Unsupported(f"needs {path} of the package {PACKAGE}, and this file does not exist")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise Unsupported(
            f"needs the weights of {PACKAGE} 0.0.2, and the SHA-256 of {path} differs"
        )
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def _weights_file() -> Path:
    try:
        return Path(str(distribution(PACKAGE).locate_file(WEIGHTS)))
    except PackageNotFoundError as error:
        raise Unsupported(
            f"needs the package {PACKAGE}, which is not installed: "
            "pip install 'mezzotint[perceptual]'"
        ) from error
