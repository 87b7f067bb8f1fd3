"""Every format of every family: detect it, generate, convert it, and generate again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mezzotint
from conftest import RecordSupport
from mezzotint.checkpoint import Checkpoint
from mezzotint.generation.generate import generate
from mezzotint.quality.metrics.image import latent_cosine
from support.checkpoint_makers import MAKERS
from support.pipeline_cases import PROMPTS, Case

COSINE = {"diffusers": 1.0, "makers": 1.0, "nunchaku int4": 0.9, "comfy w4a4": 0.9}
"""Minimum cosine of the latents with those of BF16; 0.97 for formats that are not listed."""


def generated_latents(case: Case, transformer: Path) -> Tensor:
    """Return the latents of the first prompt."""
    pipe = mezzotint.load(case.folder, transformer=transformer, device="cpu")
    return generate(pipe, PROMPTS[:1], sampling=case.sampling, check_output=False).latents


@pytest.mark.usefixtures("encoders_loaded_once")
@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name, makers in MAKERS.items() for form in makers],
    ids=lambda part: part,
)
def test_a_file_generates_and_its_conversion_generates_the_same(
    cases: Callable[[str], Case],
    tmp_path: Path,
    record_support: RecordSupport,
    name: str,
    form: str,
) -> None:
    case = cases(name)
    file = MAKERS[name][form](case, tmp_path / "made")
    checkpoint = Checkpoint.open(file)
    assert checkpoint.report.problems == ()
    latents = generated_latents(case, file)
    record_support("load", checkpoint)
    assert latent_cosine(case.result.latents[:1], latents) >= COSINE.get(form, 0.97) - 1e-6
    record_support("run", checkpoint)
    report = mezzotint.convert(file, tmp_path / "mz", base=case.folder)
    assert not report.transforms
    assert torch.equal(generated_latents(case, tmp_path / "mz"), latents)
    record_support("convert", checkpoint)
    for shown in ("load", "run"):
        record_support(shown, Checkpoint.open(tmp_path / "mz"))
