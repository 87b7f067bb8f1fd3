"""A tiny pipeline of each family on disk, and what diffusers itself generates with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import nn

import mezzotint
from mezzotint.families import Sampling
from mezzotint.generation.generate import GenerationResult, generate
from mezzotint.generation.pipeline import recommended_sampling
from support import tiny_pipelines as tiny
from support.modelopt_exporter import calibration

PROMPTS = ["a red fox", "rain"]
IMAGE_SIZE = Image.merge(
    "RGB", [Image.linear_gradient("L").rotate(turn).resize((96, 64)) for turn in (0, 90, 180)]
)
"""The image to edit: 96 x 64, each color increasing in another direction."""
TOKENS = {"flux1": 48, "flux2": 300, "flux2_klein": 128, "zimage": 64}


@dataclass
class Case:
    """A tiny pipeline on disk, diffusers' copy of it, its result, and input maxima by expert."""

    name: str
    folder: Path
    sampling: Sampling
    reference: Any
    result: GenerationResult
    largest: dict[str, dict[str, float]]

    def generate(self, **transformers: Path) -> GenerationResult:
        return generate(
            self.load(**transformers), PROMPTS, sampling=self.sampling, check_output=False
        )

    def load(self, **transformers: Path) -> Any:
        return mezzotint.load(self.folder, device="cpu", **transformers)


def small(name: str, folder: Path) -> Sampling:
    recommended = recommended_sampling(folder)
    frames = None if recommended.num_frames is None else 5
    return recommended.replace(
        steps=2, height=32, num_frames=frames, max_sequence_length=TOKENS.get(name, 48)
    )


def run_and_watch(
    name: str, pipe: Any, sampling: Sampling
) -> tuple[GenerationResult, dict[str, dict[str, float]]]:
    with (
        calibration(pipe.transformer) as first,
        calibration(getattr(pipe, "transformer_2", None) or nn.Module()) as second,
    ):
        images = [IMAGE_SIZE] * len(PROMPTS) if name in tiny.EDITORS else None
        generated = generate(
            pipe, PROMPTS, sampling=sampling, check_output=False, source_images=images
        )
    return generated, {"transformer": first} | ({"transformer_2": second} if second else {})


def make_case(name: str, folder: Path) -> Case:
    tiny.save(name, folder)
    sampling = small(name, folder)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return Case(name, folder, sampling, pipe, *run_and_watch(name, pipe, sampling))
