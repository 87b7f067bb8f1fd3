"""Z-Image's text refined once for each prompt gives the images that it gives when it is refined in every step."""

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
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The texts that are refined during the test, each time they are."""
    texts: list[Any] = []
    refine = CachedTextRefiner._run_refiner

    def counted(self: CachedTextRefiner, call: Any) -> Any:
        texts.append(call.arguments["cap_feats"])
        return refine(self, call)

    monkeypatch.setattr(CachedTextRefiner, "_run_refiner", counted)
    return texts


def test_a_generation_is_the_same(
    cases: Callable[[str], Case], tmp_path: Path, made: list[Any]
) -> None:
    """Two prompts in one batch; once for steps with inputs rounded, once for those without."""
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
    assert len(made) == 2 * len(PROMPTS)


def test_text_is_refined_again_if_it_is_another_or_was_changed(made: list[Any]) -> None:
    plain = transformer("zimage")
    once: Any = copy.deepcopy(plain)
    assert cache_text_refiner(once)
    precompute_modulation(once, SCHEDULE)
    inputs = arguments("zimage", plain, 2)
    inputs["cap_feats"][1] = torch.randn(37, inputs["cap_feats"][1].shape[1])  # padded to 64

    def same() -> int:
        torch.testing.assert_close(
            result(once, inputs), result(plain, inputs), rtol=1e-4, atol=1e-4
        )
        return len(made)

    assert same() == 1
    inputs["t"] = inputs["t"] * 0.5
    inputs["x"] = [x + 1 for x in inputs["x"]]
    assert same() == 1
    inputs["cap_feats"][0].mul_(2)
    assert same() == 2
    inputs["joint_attention_kwargs"] = {
        "scale": 0.5
    }  # of a LoRA, which the text's layers may have too
    assert same() == 3
    del inputs["joint_attention_kwargs"]
    assert same() == 3
    inputs["cap_feats"] = [text.clone() for text in inputs["cap_feats"]]
    assert same() == 4
    inputs["cap_feats"].reverse()
    assert same() == 5
    assert [type(block).__name__ for block in once.context_refiner] == [
        "ZImageTransformerBlock"
    ] * len(plain.context_refiner)
    with torch.inference_mode():
        inputs["cap_feats"] = [text + 1 for text in inputs["cap_feats"]]
        assert same() == 6
        assert same() == 7, "such tensors do not say whether they were changed"
    assert len(once.forward.wrapped_forward.cache.entries) == MAX_ENTRIES


def test_a_model_that_was_cast_refines_its_text_anew(made: list[Any]) -> None:
    plain = transformer("zimage")
    once = copy.deepcopy(plain)
    cache_text_refiner(once)
    inputs = arguments("zimage", plain)
    for dtype in (torch.float32, torch.float64):
        plain, once = plain.to(dtype), once.to(dtype)
        own = inputs | {
            name: [part.to(dtype) for part in inputs[name]] for name in ("x", "cap_feats")
        }
        torch.testing.assert_close(result(once, own), result(plain, own), rtol=1e-4, atol=1e-4)
    assert len(made) == 2


def test_only_a_text_that_is_filled_up_to_another_length_is_announced(
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


def test_other_families_have_no_such_text() -> None:
    model = transformer("flux1")
    assert not cache_text_refiner(model)
    assert not isinstance(model.forward, CachedTextRefiner)
