"""Every family made fast: its blocks compile whole, and paint what they painted layer by layer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import PROMPTS, Case
from makers import MAKERS
from mezzotint.painting import paint
from mezzotint.quality import latent_cosine
from mezzotint.schedule import StepSchedule
from mezzotint.speed import speed_up
from mezzotint.speed.linking import compile_blocks

FAMILIES = ["flux1", "flux2", "wan_ti2v", "zimage", "qwenimage"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fast_model_paints_the_same(
    cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By the compiler without code generation, which tests/test_gpu.py has. One step rounds inputs, one does not."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    case = cases(name)
    file = MAKERS[name]["modelopt nvfp4"](case, tmp_path / "made")
    pipe: Any = case.load(transformer=file)
    run = partial(paint, pipe, PROMPTS[:1], sampling=case.sampling, guard=False, bf16_steps=StepSchedule(1, 0))
    expected = run().latents
    monkeypatch.setattr(
        "mezzotint.speed.compile_blocks",
        lambda model, fullgraph, backend: compile_blocks(model, fullgraph=fullgraph, backend="aot_eager"),
    )
    assert speed_up(pipe.transformer).joined > 0
    assert latent_cosine(run().latents, expected) > 1 - 1e-6
