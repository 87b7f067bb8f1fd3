"""`FastTransformer.restore` gives back the eager model, and every bit of its output.

Passes that need FP8 kernels are in test_fuse_activations.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mezzotint.fast import speed_up
from mezzotint.fast.edits import ModelEdits
from support.checkpoint_makers import MAKERS
from support.deferred_residual_models import cast
from support.modulation_models import SCHEDULE, arguments, result
from support.pipeline_cases import Case
from support.restored_models import assert_restored, structure, tensors

FAMILIES = ["flux1", "flux2", "wan_ti2v", "zimage", "qwenimage"]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_restored_models_compute_the_same_bits(
    cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = cases(name)
    pipe: Any = case.load(transformer=MAKERS[name]["modelopt nvfp4"](case, tmp_path / "made"))
    model = pipe.transformer.eval()
    modules, weights = structure(model), tensors(model)
    family = "wan" if name.startswith("wan") else name
    inputs = cast(arguments(family, model), torch.bfloat16)
    expected = result(model, inputs)
    sped_up = speed_up(model, scheduler=SCHEDULE)
    assert sped_up.report.fused_groups > 0
    assert "cuda_graphs" in sped_up.report.skipped
    assert sped_up.restore() is model
    assert_restored(model, modules, weights)
    assert torch.equal(result(model, inputs), expected)
    again = speed_up(model)
    assert again.report.fused_groups == sped_up.report.fused_groups
    again.restore()
    again.restore()
    assert_restored(model, modules, weights)


def test_edits_restore_attributes_that_only_the_class_had() -> None:
    layer = nn.Linear(2, 2)
    edits = ModelEdits()
    edits.set(layer, forward=lambda x: x, note="text")
    edits.set(layer, note="more")
    edits.undo()
    assert "forward" not in vars(layer)
    assert not hasattr(layer, "note")
