"""ST-LPIPS, a learned distance between images that forgives shifts: Ghildyal and Liu, ECCV 2022.

The trained weights come with the package stlpips-pytorch (the extra `perceptual`). Its code is not imported: it wants
torchvision and packages that it does not declare. So the network is defined here: an AlexNet that takes every pixel
and blurs before it halves. The features of two images, each pixel's normalized to length 1, are subtracted and
squared, weighted by channel, and averaged over all pixels; the five layers are added up.
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
"""Of the weights in version 0.0.2. Other weights give other numbers, and no gate's limits are for those."""
SMALLEST = 21
"""Pixels that a side needs: below that, the last blur has fewer than it mirrors."""
TINY = 1e-10

Weights = Mapping[str, Tensor]
"""{name in the file: float32 tensor}"""


def st_lpips(reference: Tensor, candidate: Tensor) -> Tensor:
    """Distance of each pair of images, float64 [n], 0 where both are equal.

    reference, candidate   [n, 3, height, width] in 0..1, sides of SMALLEST or more
    Raises                 Unsupported if the weights cannot be had, see `unavailable_because`
    """
    weights = _weights()
    pairs = zip(reference.float(), candidate.float(), strict=True)
    with torch.inference_mode():
        return torch.tensor([_distance(weights, r[None], c[None]) for r, c in pairs], dtype=torch.float64)


def unavailable_because() -> str:
    """Return why there are no weights here, or an empty string."""
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
    """Yield the outputs of the five layers, [1, channels, height, width], of length 1 at each pixel."""
    x = (2 * image - 1 - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
    x = F.relu(_blurred(_convolved(weights, "net.slice1.0", x, padding=2)))
    yield _normalized(x)
    x = F.relu(_convolved(weights, "net.slice2.5", _pooled(x), padding=2))
    yield _normalized(x)
    x = F.relu(_convolved(weights, "net.slice3.9", _pooled(x), padding=1))
    yield _normalized(x)
    for name in ("net.slice4.11", "net.slice5.13"):
        x = F.relu(_convolved(weights, name, x, padding=1))
        yield _normalized(x)


def _convolved(weights: Weights, name: str, x: Tensor, padding: int) -> Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)


def _pooled(x: Tensor) -> Tensor:
    return _blurred(F.max_pool2d(x, kernel_size=3, stride=1))


def _blurred(x: Tensor) -> Tensor:
    """Blur by (1 2 1) / 4 in both directions, two mirrored pixels around, and keep every second pixel."""
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(line, line).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def _normalized(x: Tensor) -> Tensor:
    length: Tensor = x.square().sum(dim=1, keepdim=True).sqrt()
    return x / (length + TINY)


@cache
def _weights() -> Weights:
    """Return the weights that come with the package.

    Raises   Unsupported if it is not installed, or if its file is missing or another
    """
    path = _weights_file()
    if not path.is_file():
        raise Unsupported(f"needs {path}, which the package {PACKAGE} should have; it is not there")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise Unsupported(f"needs the weights of {PACKAGE} 0.0.2, and {path} has others (by its SHA-256)")
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def _weights_file() -> Path:
    try:
        return Path(str(distribution(PACKAGE).locate_file(WEIGHTS)))
    except PackageNotFoundError as error:
        raise Unsupported(
            f"needs the package {PACKAGE}, which is not installed: pip install 'mezzotint[perceptual]'"
        ) from error
