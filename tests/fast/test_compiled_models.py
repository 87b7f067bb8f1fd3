"""Every family after `speed_up`: blocks compile without graph breaks and compute the same."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.fast import speed_up
from mezzotint.fast.passes.compile_blocks import compile_blocks
from mezzotint.generation.generate import generate
from mezzotint.generation.schedule import StepSchedule
from mezzotint.quality.metrics.image import latent_cosine
from support.checkpoint_makers import MAKERS
from support.pipeline_cases import PROMPTS, Case

FAMILIES = ["flux1", "flux2", "wan_ti2v", "zimage", "qwenimage"]


@pytest.mark.parametrize("name", FAMILIES)
def test_fast_model_generates_the_same(
    cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Compile without code generation (tests/gpu/test_gpu.py has it); one step is in BF16."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    case = cases(name)
    file = MAKERS[name]["modelopt nvfp4"](case, tmp_path / "made")
    pipe: Any = case.load(transformer=file)
    run = partial(
        generate,
        pipe,
        PROMPTS[:1],
        sampling=case.sampling,
        check_output=False,
        bf16_steps=StepSchedule(1, 0),
    )
    expected = run().latents
    monkeypatch.setattr(
        "mezzotint.fast.passes.compile_blocks.compile_blocks",
        lambda model, edits, fullgraph, backend: compile_blocks(
            model, edits, fullgraph=fullgraph, backend="aot_eager"
        ),
    )
    assert speed_up(pipe.transformer).report.fused_groups > 0
    assert latent_cosine(run().latents, expected) > 1 - 1e-6
