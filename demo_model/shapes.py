"""Captioned shapes: the data that the built-in demo model learns to generate.

A caption reads "a large red circle on a blue background". This module parses such captions, draws
them (antialiased, from signed distances, on any torch device), and scores an image against its
caption.

All images are 64 x 64. Lengths are in pixels. Colors in tensors are RGB in [0, 1].
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_SIZE = 64
JITTER = 3.0  # the center of a shape moves by at most this, in x and in y
SIZES = {"small": 12.0, "large": 22.0}  # radius
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "yellow": (250, 215, 50),
    "purple": (130, 60, 180),
    "orange": (245, 135, 30),
    "pink": (250, 150, 190),
    "cyan": (60, 200, 220),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}


# ----------------------------------------------------------------------------------------- captions


@dataclass(frozen=True)
class Scene:
    """The content of one caption."""

    size: str
    color: str
    shape: str
    background: str

    def __str__(self) -> str:
        article = "an" if self.background[0] in "aeiou" else "a"
        return f"a {self.size} {self.color} {self.shape} on {article} {self.background} background"


def parse(caption: str) -> Scene:
    """The scene that `caption` describes; ValueError if it is not of the grammar."""
    match caption.split():
        case ["a", size, color, shape, "on", "a" | "an", background, "background"]:
            scene = Scene(size, color, shape, background)
            if size in SIZES and shape in SHAPES and color in COLORS and background in COLORS:
                return scene
    raise ValueError(f"not a caption of this grammar: {caption!r}")


def all_captions() -> list[str]:
    """Every caption whose shape differs in color from its background: 2 x 10 x 8 x 9 = 1440."""
    product = itertools.product(SIZES, COLORS, SHAPES, COLORS)
    return [str(Scene(*words)) for words in product if words[1] != words[3]]


def split_captions(held_out: int = 240, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return disjoint (training, test) captions, in an order that depends only on `seed`."""
    captions = all_captions()
    random.Random(seed).shuffle(captions)
    return captions[held_out:], captions[:held_out]


# ------------------------------------------------------------------------------------------ drawing


class SceneBatch(NamedTuple):
    """Many scenes as tensors on one device."""

    shape: Tensor  # [B] int64, index into SHAPES
    radius: Tensor  # [B]
    color: Tensor  # [B, 3]
    background: Tensor  # [B, 3]

    def pick(self, index: Tensor) -> SceneBatch:
        """The scenes at `index` [N]."""
        return SceneBatch(*(field[index] for field in self))


def batch_scenes(captions: list[str], device: torch.device | str = "cpu") -> SceneBatch:
    """Parse `captions` into tensors."""
    scenes = [parse(caption) for caption in captions]
    return SceneBatch(
        torch.tensor([SHAPES.index(scene.shape) for scene in scenes], device=device),
        torch.tensor([SIZES[scene.size] for scene in scenes], device=device),
        torch.tensor([COLORS[scene.color] for scene in scenes], device=device) / 255,
        torch.tensor([COLORS[scene.background] for scene in scenes], device=device) / 255,
    )


def signed_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the signed distance to the outline of every shape at radius 1, negative inside.

    Outside and near corners, the distance may be too small, which does not affect antialiasing.

    x, y      coordinates to the right and down, of equal shape
    Returns   [len(SHAPES), *x.shape]
    """
    ax, ay = x.abs(), y.abs()
    length = torch.hypot(x, y)
    circle = length - 0.95
    square = torch.maximum(ax, ay) - 0.84
    slope = math.atan2(0.95, 1.75)  # of a triangle with its tip at (0, -1) and its base at y = 0.75
    triangle = torch.maximum(y - 0.75, ax * math.cos(slope) - (y + 1) * math.sin(slope))
    diamond = (ax + ay - 1.08) / math.sqrt(2)
    cross = torch.maximum(torch.minimum(ax, ay) - 0.32, torch.maximum(ax, ay) - 0.98)
    ring = (length - 0.72).abs() - 0.25
    # A heart is a diamond with a half disc on either upper edge.
    side = 0.92
    lobe = torch.hypot(ax - side / 2, y + side / 2 - 0.12) - side / math.sqrt(2)
    heart = torch.minimum((ax + (y - 0.12).abs() - side) / math.sqrt(2), lobe)
    return torch.stack([circle, square, triangle, diamond, _star(x, y), cross, ring, heart])


def _star(x: Tensor, y: Tensor, outer: float = 1.1, inner: float = 0.5) -> Tensor:
    """Distance to a star of five points, one of them upwards."""
    tenth = math.pi / 5
    angle = (
        torch.remainder(torch.atan2(x, -y) + tenth, 2 * tenth) - tenth
    )  # to the nearest point's axis
    length = torch.hypot(x, y)
    along, across = length * angle.cos(), length * angle.sin().abs()
    edge = (
        inner * math.cos(tenth) - outer,
        inner * math.sin(tenth),
    )  # from the tip to the next notch
    return (across * -edge[0] - (outer - along) * edge[1]) / math.hypot(*edge)


def coverage(shape: Tensor, radius: Tensor, offset: Tensor) -> Tensor:
    """Return antialiased masks [B, 64, 64] in [0, 1].

    shape    [B], indices of SHAPES
    radius   [B], in pixels
    offset   [B, 2], (x, y) of the center
    """
    axis = torch.arange(IMAGE_SIZE, device=offset.device) - (IMAGE_SIZE - 1) / 2
    scale = radius[:, None, None]
    x = (axis[None, None, :] - offset[:, 0, None, None]) / scale
    y = (axis[None, :, None] - offset[:, 1, None, None]) / scale
    distances = signed_distances(*torch.broadcast_tensors(x, y))
    chosen = distances.gather(0, shape[None, :, None, None].expand(1, *distances.shape[1:]))[0]
    return (0.5 - chosen * scale).clamp(0, 1)


def rasterize(scenes: SceneBatch, offset: Tensor) -> Tensor:
    """Images [B, 3, 64, 64] in [0, 1] of `scenes`, each moved by its row of `offset` [B, 2]."""
    mask = coverage(scenes.shape, scenes.radius, offset)[:, None]
    return torch.lerp(scenes.background[:, :, None, None], scenes.color[:, :, None, None], mask)


def render(caption: str, rng: np.random.Generator | None = None) -> Image.Image:
    """Draw `caption`, in the middle or, given `rng`, up to JITTER pixels off it."""
    offset = np.zeros(2) if rng is None else rng.uniform(-JITTER, JITTER, size=2)
    image = rasterize(batch_scenes([caption]), torch.tensor(offset, dtype=torch.float32)[None])[0]
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


# ------------------------------------------------------------------------------------------ judging


class Score(TypedDict):
    """The attributes of a caption that an image shows, and the IoU with the best template."""

    shape: bool
    color: bool
    background: bool
    size: bool
    iou: float


@functools.cache
def _templates() -> tuple[list[tuple[str, str]], Tensor]:
    """Return names (size, shape) and masks [N, 4096] of all shapes, moved by up to 4 pixels."""
    moves = list(itertools.product(range(-4, 5), repeat=2))
    names, masks = [], []
    for size, shape in itertools.product(SIZES, SHAPES):
        index = torch.full((len(moves),), SHAPES.index(shape))
        radius = torch.full((len(moves),), SIZES[size])
        names += [(size, shape)] * len(moves)
        masks.append(coverage(index, radius, torch.tensor(moves, dtype=torch.float32)))
    return names, torch.cat(masks).flatten(1)


def _nearest_color(rgb: Tensor) -> str:
    """The name of the palette color nearest to `rgb` [3]."""
    palette = torch.tensor(list(COLORS.values())) / 255
    return list(COLORS)[int((palette - rgb).square().sum(1).argmin())]


def score(image: Image.Image, caption: str, min_iou: float = 0.75) -> Score:
    """Score an image (64 x 64) against a caption.

    The background is the median of a border four pixels wide. The shape's color is the median of
    the pixels that differ from it. A soft mask interpolates each pixel between the two colors.
    Shape and size are those of the template with the highest intersection over union, if that is
    at least `min_iou`. The caption is only used for the final comparison.
    """
    said = parse(caption)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).float() / 255
    frame = torch.ones(pixels.shape[:2], dtype=torch.bool)
    frame[4:-4, 4:-4] = False
    background = pixels[frame].median(0).values
    different = (pixels - background).norm(dim=-1) > 0.2
    if not different.any():
        same = _nearest_color(background) == said.background
        return Score(shape=False, color=False, background=same, size=False, iou=0.0)
    color = pixels[different].median(0).values
    way = color - background
    mask = ((pixels - background) @ way / way.square().sum().clamp_min(1e-6)).clamp(0, 1).flatten()
    names, templates = _templates()
    fit = torch.minimum(templates, mask).sum(1) / torch.maximum(templates, mask).sum(1)
    iou = float(fit.max())
    size, shape = names[int(fit.argmax())]
    return Score(
        shape=shape == said.shape and iou >= min_iou,
        color=_nearest_color(color) == said.color,
        background=_nearest_color(background) == said.background,
        size=size == said.size and iou >= min_iou,
        iou=iou,
    )
