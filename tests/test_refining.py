"""Z-Image's text refined once for each prompt gives the pictures that it gives when it is refined in every step."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import PROMPTS, Case
from makers import MAKERS
from mezzotint.painting import paint
from mezzotint.schedule import StepSchedule
from mezzotint.speed.modulation import work_ahead
from mezzotint.speed.refining import Refined, refine_once
from mezzotint.speed.remembered import KEPT
from mezzotint.speed.shapes import Announced
from test_modulation import SCHEDULE, arguments, result, transformer


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The texts that are refined during the test, each time they are."""
    texts: list[Any] = []
    refine = Refined._refine

    def counted(self: Refined, call: Any) -> Any:
        texts.append(call.arguments["cap_feats"])
        return refine(self, call)

    monkeypatch.setattr(Refined, "_refine", counted)
    return texts


def test_a_painting_is_the_same(cases: Callable[[str], Case], tmp_path: Path, made: list[Any]) -> None:
    """Two prompts in one batch; once for steps with inputs rounded, once for those without."""
    case = cases("zimage")
    pipe = case.load(transformer=MAKERS["zimage"]["modelopt nvfp4"](case, tmp_path / "made"))
    sampling = case.sampling.but(steps=4)
    expected = paint(pipe, PROMPTS, sampling=sampling, guard=False, bf16_steps=StepSchedule(1, 1)).latents
    assert refine_once(pipe.transformer)
    got = paint(pipe, PROMPTS, sampling=sampling, guard=False, bf16_steps=StepSchedule(1, 1)).latents
    assert torch.equal(got, expected)
    assert len(made) == 2 * len(PROMPTS)


def test_text_is_refined_again_if_it_is_another_or_was_changed(made: list[Any]) -> None:
    plain = transformer("zimage")
    once: Any = copy.deepcopy(plain)
    assert refine_once(once)
    work_ahead(once, SCHEDULE)
    inputs = arguments("zimage", plain, 2)
    inputs["cap_feats"][1] = torch.randn(37, inputs["cap_feats"][1].shape[1])  # padded to 64

    def same() -> int:
        torch.testing.assert_close(result(once, inputs), result(plain, inputs), rtol=1e-4, atol=1e-4)
        return len(made)

    assert same() == 1
    inputs["t"] = inputs["t"] * 0.5
    inputs["x"] = [x + 1 for x in inputs["x"]]
    assert same() == 1
    inputs["cap_feats"][0].mul_(2)
    assert same() == 2
    inputs["joint_attention_kwargs"] = {"scale": 0.5}  # of a LoRA, which the text's layers may have too
    assert same() == 3
    del inputs["joint_attention_kwargs"]
    assert same() == 3
    inputs["cap_feats"] = [text.clone() for text in inputs["cap_feats"]]
    assert same() == 4
    inputs["cap_feats"].reverse()
    assert same() == 5
    assert [type(block).__name__ for block in once.context_refiner] == ["ZImageTransformerBlock"] * len(
        plain.context_refiner
    )
    with torch.inference_mode():
        inputs["cap_feats"] = [text + 1 for text in inputs["cap_feats"]]
        assert same() == 6
        assert same() == 7, "such tensors do not say whether they were changed"
    assert len(once.forward.function.texts.results) == KEPT


def test_a_model_that_was_cast_refines_its_text_anew(made: list[Any]) -> None:
    plain = transformer("zimage")
    once = copy.deepcopy(plain)
    refine_once(once)
    inputs = arguments("zimage", plain)
    for dtype in (torch.float32, torch.float64):
        plain, once = plain.to(dtype), once.to(dtype)
        own = inputs | {name: [part.to(dtype) for part in inputs[name]] for name in ("x", "cap_feats")}
        torch.testing.assert_close(result(once, own), result(plain, own), rtol=1e-4, atol=1e-4)
    assert len(made) == 2


def test_only_a_text_that_is_filled_up_to_another_length_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = transformer("zimage")
    model.forward = Announced(model)
    refine_once(model)
    inputs = arguments("zimage", model)
    width = inputs["cap_feats"][0].shape[1]
    for tokens in (37, 40, 64, 65):
        inputs["cap_feats"] = [torch.randn(tokens, width)]
        result(model, inputs)
    (record,) = caplog.records
    assert "cap_feats[0] 64x" in record.message


def test_other_families_have_no_such_text() -> None:
    model = transformer("flux1")
    assert not refine_once(model)
    assert not isinstance(model.forward, Refined)
