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
from mezzotint.generation.schedule import NO_STEPS, StepSchedule
from mezzotint.quality.metrics.image import latent_cosine
from support.checkpoint_makers import MAKERS
from support.pipeline_cases import PROMPTS, Case

pytestmark = pytest.mark.usefixtures("encoders_loaded_once")
FAMILIES = [
    ("flux1", "modelopt nvfp4", StepSchedule(1, 0), "aot_eager"),
    ("flux2", "modelopt fp8", NO_STEPS, "eager"),
    ("wan_ti2v", "modelopt fp8", NO_STEPS, "eager"),
    ("zimage", "modelopt fp8", NO_STEPS, "eager"),
    ("qwenimage", "modelopt fp8", NO_STEPS, "eager"),
]
"""Dynamo traces every family. What AOTAutograd and a change of modes do depends on none."""


@pytest.mark.parametrize(("name", "form", "bf16_steps", "backend"), FAMILIES)
def test_fast_model_generates_the_same(
    cases: Callable[[str], Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    form: str,
    bf16_steps: StepSchedule,
    backend: str,
) -> None:
    """Compile without code generation; tests/gpu/test_gpu.py has it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    case = cases(name)
    file = MAKERS[name][form](case, tmp_path / "made")
    pipe: Any = case.load(transformer=file)
    run = partial(
        generate,
        pipe,
        PROMPTS[:1],
        sampling=case.sampling,
        check_output=False,
        bf16_steps=bf16_steps,
    )
    expected = run().latents
    monkeypatch.setattr(
        "mezzotint.fast.passes.compile_blocks.compile_blocks",
        lambda model, edits, **options: compile_blocks(
            model, edits, **options | {"backend": backend}
        ),
    )
    assert speed_up(pipe.transformer).report.fused_groups > 0
    assert latent_cosine(run().latents, expected) > 1 - 1e-6
