"""Generate images in BF16, FP8 and NVFP4 with the built-in model, and compare them."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL.Image import Image

from mezzotint.builtin import DEMO
from mezzotint.generation.generate import GenerationResult, generate
from mezzotint.generation.image_io import contact_sheet
from mezzotint.generation.pipeline import load_pipeline
from mezzotint.generation.request import Request
from mezzotint.generation.source import PipelineSource
from mezzotint.loading.residency import AS_STORED_BITS
from mezzotint.quality.metrics.image import latent_cosine, psnr, ssim, stack

PROMPTS = (
    "a large red circle on a blue background",
    "a small green triangle on a yellow background",
    "a large white star on a purple background",
    "a small black square on a white background",
    "a large orange cross on a black background",
    "a small yellow diamond on a red background",
)
TRANSFORMERS = {"bf16": None, "fp8": "demo-fp8", "nvfp4": "demo-nvfp4"}
"""{name: transformer}; the others are compared with the first."""


@dataclass(frozen=True)
class Row:
    """One precision: resident weights of the transformer, agreement with BF16, and time per image.

    weights_mib   in MiB
    psnr          in dB; None for equal images
    """

    name: str
    weights_mib: float
    latent_cosine: float
    psnr: float | None
    ssim: float
    seconds_per_image: float


@dataclass(frozen=True)
class DemoResult:
    """The table, and the contact sheet with a row per precision and a column per prompt."""

    rows: tuple[Row, ...]
    sheet: Image

    def to_dict(self) -> dict[str, Any]:
        """Return what `mezzotint demo --json` prints."""
        return {"rows": [asdict(row) for row in self.rows], "prompts": list(PROMPTS)}


def run(
    device: str | torch.device | None = None, on_row: Callable[[str], None] = lambda _name: None
) -> DemoResult:
    """Generate the images in every precision; `on_row` is called with the name of each before."""
    rows: list[Row] = []
    results: list[GenerationResult] = []
    for name, transformer in TRANSFORMERS.items():
        on_row(name)
        source = PipelineSource.open(DEMO, {"transformer": transformer})
        loaded = load_pipeline(source, device, resident=AS_STORED_BITS)
        started = time.perf_counter()
        results.append(
            generate(loaded.pipe, Request(PROMPTS, sampling=source.recommended_sampling()))
        )
        seconds = (time.perf_counter() - started) / len(PROMPTS)
        weights = sum(loaded.reports["transformer"].resident_bytes.values()) / 2**20
        rows.append(_row(name, weights, seconds, results[0], results[-1]))
    images = [result.images for result in results]
    return DemoResult(tuple(rows), contact_sheet(images, list(TRANSFORMERS), PROMPTS, scale=2))


def _row(
    name: str,
    weights_mib: float,
    seconds: float,
    reference: GenerationResult,
    candidate: GenerationResult,
) -> Row:
    """Compare the images of one precision with those of the reference."""
    expected, actual = stack(reference.images), stack(candidate.images)
    return Row(
        name=name,
        weights_mib=weights_mib,
        latent_cosine=latent_cosine(reference.latents, candidate.latents),
        psnr=None if torch.equal(expected, actual) else float(psnr(expected, actual).mean()),
        ssim=float(ssim(expected, actual).mean()),
        seconds_per_image=seconds,
    )
