"""The main job on the built-in model: the same pictures in BF16, FP8 and NVFP4, and how far they agree."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL.Image import Image

from mezzotint.builtin import DEMO
from mezzotint.painting import Painting, paint
from mezzotint.pictures import sheet
from mezzotint.pipelines import load, sampling_of
from mezzotint.quality.metrics import latent_cosine, psnr, ssim, stack
from mezzotint.residency import STORED

PROMPTS = (
    "a large red circle on a blue background",
    "a small green triangle on a yellow background",
    "a large white star on a purple background",
    "a small black square on a white background",
    "a large orange cross on a black background",
    "a small yellow diamond on a red background",
)
ROWS = {"bf16": None, "fp8": "demo-fp8", "nvfp4": "demo-nvfp4"}
"""{name: transformer}; the first row is what the others are compared with."""


@dataclass(frozen=True)
class Row:
    """One precision: resident weights of the transformer, agreement with BF16, and the time of one picture.

    psnr   in dB; None where the pictures are equal
    """

    name: str
    weights_mib: float
    latent_cosine: float
    psnr: float | None
    ssim: float
    seconds_per_image: float


@dataclass(frozen=True)
class Demo:
    """The table and the contact sheet (rows = precision, columns = prompts)."""

    rows: tuple[Row, ...]
    sheet: Image

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "prompts": list(PROMPTS)}


def run(device: str | torch.device | None = None, on_row: Callable[[str], None] = lambda _name: None) -> Demo:
    """Paint every row and compare it with the first; `on_row` is called with a row's name before it is painted."""
    rows: list[Row] = []
    paintings: list[Painting] = []
    for name, transformer in ROWS.items():
        on_row(name)
        pipe = load(DEMO, transformer=transformer, device=device, resident=STORED)
        started = time.perf_counter()
        paintings.append(paint(pipe, PROMPTS, seeds=range(len(PROMPTS)), sampling=sampling_of(DEMO)))
        seconds = (time.perf_counter() - started) / len(PROMPTS)
        weights = sum(pipe.load_report.resident_bytes.values()) / 2**20
        rows.append(_row(name, weights, seconds, paintings[0], paintings[-1]))
    pictures: Sequence[Sequence[Image]] = [painting.images for painting in paintings]
    return Demo(tuple(rows), sheet(pictures, list(ROWS), PROMPTS, scale=2))


def _row(name: str, weights_mib: float, seconds: float, reference: Painting, candidate: Painting) -> Row:
    expected, found = stack(reference.images), stack(candidate.images)
    return Row(
        name=name,
        weights_mib=weights_mib,
        latent_cosine=latent_cosine(reference.latents, candidate.latents),
        psnr=None if torch.equal(expected, found) else float(psnr(expected, found).mean()),
        ssim=float(ssim(expected, found).mean()),
        seconds_per_image=seconds,
    )
