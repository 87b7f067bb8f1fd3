"""Z-Image's text, refined once per prompt, gives the same images as refining it in every step."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.fast.passes.cached_text_refiner import cache_text_refiner
from mezzotint.fast.passes.precomputed_modulation import precompute_modulation
from mezzotint.fast.runtime.recompile_warning import RecompileWarning
from mezzotint.fast.runtime.tensor_cache import MAX_ENTRIES
from mezzotint.fast.runtime.text import CachedTextRefiner
from mezzotint.generation.generate import generate
from mezzotint.generation.schedule import StepSchedule
from support.checkpoint_makers import MAKERS
from support.modulation_models import SCHEDULE, arguments, result, transformer
from support.pipeline_cases import PROMPTS, Case


@pytest.fixture
def refined_texts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that gets each text when it is refined."""
    texts: list[Any] = []
    refine = CachedTextRefiner._run_refiner

    def counted(self: CachedTextRefiner, call: Any) -> Any:
        texts.append(call.arguments["cap_feats"])
        return refine(self, call)

    monkeypatch.setattr(CachedTextRefiner, "_run_refiner", counted)
    return texts


def test_generation_is_unchanged(
    cases: Callable[[str], Case], tmp_path: Path, refined_texts: list[Any]
) -> None:
    """Two prompts in one batch, each refined once with quantized activations and once without."""
    case = cases("zimage")
    pipe = case.load(transformer=MAKERS["zimage"]["modelopt nvfp4"](case, tmp_path / "made"))
    sampling = case.sampling.replace(steps=4)
    expected = generate(
        pipe, PROMPTS, sampling=sampling, check_output=False, bf16_steps=StepSchedule(1, 1)
    ).latents
    assert cache_text_refiner(pipe.transformer)
    got = generate(
        pipe, PROMPTS, sampling=sampling, check_output=False, bf16_steps=StepSchedule(1, 1)
    ).latents
    assert torch.equal(got, expected)
    assert len(refined_texts) == 2 * len(PROMPTS)


def test_new_or_changed_text_is_refined_again(refined_texts: list[Any]) -> None:
    plain = transformer("zimage")
    cached: Any = copy.deepcopy(plain)
    assert cache_text_refiner(cached)
    precompute_modulation(cached, SCHEDULE)
    inputs = arguments("zimage", plain, 2)
    inputs["cap_feats"][1] = torch.randn(37, inputs["cap_feats"][1].shape[1])  # padded to 64

    def refinements() -> int:
        torch.testing.assert_close(
            result(cached, inputs), result(plain, inputs), rtol=1e-4, atol=1e-4
        )
        return len(refined_texts)

    assert refinements() == 1
    inputs["t"] = inputs["t"] * 0.5
    inputs["x"] = [x + 1 for x in inputs["x"]]
    assert refinements() == 1
    inputs["cap_feats"][0].mul_(2)
    assert refinements() == 2
    # The scale of a LoRA, which the text's layers may have too.
    inputs["joint_attention_kwargs"] = {"scale": 0.5}
    assert refinements() == 3
    del inputs["joint_attention_kwargs"]
    assert refinements() == 3
    inputs["cap_feats"] = [text.clone() for text in inputs["cap_feats"]]
    assert refinements() == 4
    inputs["cap_feats"].reverse()
    assert refinements() == 5
    assert [type(block).__name__ for block in cached.context_refiner] == [
        "ZImageTransformerBlock"
    ] * len(plain.context_refiner)
    with torch.inference_mode():
        inputs["cap_feats"] = [text + 1 for text in inputs["cap_feats"]]
        assert refinements() == 6
        assert refinements() == 7, "inference tensors have no version"
    assert len(cached.forward.wrapped_forward.cache.entries) == MAX_ENTRIES


def test_cast_model_refines_its_text_again(refined_texts: list[Any]) -> None:
    plain = transformer("zimage")
    cached = copy.deepcopy(plain)
    cache_text_refiner(cached)
    inputs = arguments("zimage", plain)
    for dtype in (torch.float32, torch.float64):
        plain, cached = plain.to(dtype), cached.to(dtype)
        cast_inputs = inputs | {
            name: [part.to(dtype) for part in inputs[name]] for name in ("x", "cap_feats")
        }
        torch.testing.assert_close(
            result(cached, cast_inputs), result(plain, cast_inputs), rtol=1e-4, atol=1e-4
        )
    assert len(refined_texts) == 2


def test_recompile_warning_depends_on_the_padded_text_length(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model: Any = transformer("zimage")
    model.forward = RecompileWarning(model)
    cache_text_refiner(model)
    inputs = arguments("zimage", model)
    width = inputs["cap_feats"][0].shape[1]
    for tokens in (37, 40, 64, 65):
        inputs["cap_feats"] = [torch.randn(tokens, width)]
        result(model, inputs)
    (record,) = caplog.records
    assert "cap_feats[0] 64x" in record.message


def test_family_without_text_refiner_is_unchanged() -> None:
    model = transformer("flux1")
    assert not cache_text_refiner(model)
    assert not isinstance(model.forward, CachedTextRefiner)
