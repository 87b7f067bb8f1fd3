"""Every format that a family's users have, end to end: recognised, painted with, converted, and painted with again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mezzotint
from cases import PROMPTS, Case
from conftest import Proves
from makers import MAKERS
from mezzotint.checkpoint import Checkpoint
from mezzotint.painting import paint
from mezzotint.quality import latent_cosine

COSINE = {"diffusers": 1.0, "makers": 1.0, "nunchaku int4": 0.9}
"""Least agreement of the latents with BF16's; of all others 0.97."""


def painted(case: Case, transformer: Path) -> Tensor:
    pipe = mezzotint.load(case.folder, transformer=transformer, device="cpu")
    return paint(pipe, PROMPTS, sampling=case.sampling, guard=False).latents


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, makers in MAKERS.items() for form in makers], ids=lambda part: part
)
def test_a_file_paints_and_its_conversion_paints_the_same(
    cases: Callable[[str], Case], tmp_path: Path, proves: Proves, name: str, form: str
) -> None:
    case = cases(name)
    file = MAKERS[name][form](case, tmp_path / "made")
    checkpoint = Checkpoint.open(file)
    assert checkpoint.report.missing == ()
    latents = painted(case, file)
    proves("load", checkpoint)
    assert latent_cosine(case.painting.latents, latents) >= COSINE.get(form, 0.97) - 1e-6
    proves("run", checkpoint)
    report = mezzotint.convert(file, tmp_path / "mz", base=case.folder)
    assert not report.transforms
    assert torch.equal(painted(case, tmp_path / "mz"), latents)
    proves("convert", checkpoint)
    for shown in ("load", "run"):
        proves(shown, Checkpoint.open(tmp_path / "mz"))
