"""Step schedules: which steps leave inputs in BF16, what a layer does then, and what that buys."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mezzotint import speed
from mezzotint.errors import BadRequest
from mezzotint.kernels import BF16
from mezzotint.nn import QuantLinear, attention_is_exact, exact_attention, overrides, unrounded_inputs, use_backend
from mezzotint.painting import paint
from mezzotint.pipelines import load, sampling_of
from mezzotint.quality.candidate import read_sources
from mezzotint.quality.prompts import read_prompts
from mezzotint.quality.sensitivity import sensitivity
from mezzotint.quality.step_sensitivity import StepGain, schedule_for
from mezzotint.schedule import StepSchedule, scheduled
from mezzotint.speed.attention import ATTENTIONS
from mezzotint.speed.attention_layers import _takes_fp8
from test_cli import run
from test_kernels import fp8_tensor, nvfp4_tensor

PROMPT = ["a large red circle on a blue background"]
SMALL = sampling_of("demo").but(steps=3, size=64)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60))
def test_a_schedule_covers_both_ends(first: int, last: int, steps: int) -> None:
    covered = [StepSchedule(first, last).covers(step, steps) for step in range(steps)]
    assert covered == [
        step in {*range(steps)[:first], *range(steps)[steps - min(last, steps) :]} for step in range(steps)
    ]


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_what_is_written_is_read(first: int, last: int) -> None:
    assert StepSchedule.read(str(StepSchedule(first, last))) == StepSchedule(first, last)


@pytest.mark.parametrize("text", ["", "2", "2,1", "-1+2", "2+1+0", "a+b", "2 + 1"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="is no step schedule"):
        StepSchedule.read(text)


@pytest.mark.parametrize("make", [fp8_tensor, nvfp4_tensor], ids=["fp8", "nvfp4"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_unrounded_inputs_are_those_of_bf16_activations(make: Any, compiled: bool) -> None:
    layer, unrounded = QuantLinear(make()), QuantLinear(make(), activations=BF16)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    product = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    rounded = product(x)
    with unrounded_inputs():
        assert torch.equal(product(x), unrounded(x))
        with use_backend("reference"):
            assert overrides() == ("reference", True)
            assert torch.equal(product(x), unrounded(x))
    assert not torch.equal(rounded, unrounded(x))
    assert torch.equal(product(x), rounded)
    assert overrides() == (None, False)


def test_a_layer_whose_inputs_are_not_rounded_stays_on_its_backend() -> None:
    assert QuantLinear(fp8_tensor(), activations=BF16).decoder is None


def trajectory(activations: str, schedule: StepSchedule) -> list[Tensor]:
    pipe = load("demo", transformer="demo-nvfp4", device="cpu", activations=activations)
    latents: list[Tensor] = []
    paint(pipe, PROMPT, sampling=SMALL, on_step=lambda _, now: latents.append(now), bf16_steps=schedule, guard=False)
    assert overrides() == (None, False)
    return latents


def test_each_step_runs_as_the_schedule_says() -> None:
    stored, bf16 = (trajectory(activations, StepSchedule()) for activations in ("as_stored", "bf16"))
    whole, ends = trajectory("as_stored", StepSchedule(3, 3)), trajectory("as_stored", StepSchedule(1, 1))
    assert all(map(torch.equal, whole, bf16))
    assert torch.equal(ends[0], bf16[0])
    assert not torch.equal(ends[1], bf16[1])
    error = [float(torch.dist(latents[-1], bf16[-1])) for latents in (ends, stored)]
    assert 0 < error[0] < error[1]


def test_every_picture_follows_the_schedule_from_its_first_step() -> None:
    pipe = load("demo", transformer="demo-nvfp4", device="cpu")
    seen: list[bool] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(overrides()[1]))
    paint(pipe, PROMPT * 2, sampling=SMALL.but(guidance=1.0), bf16_steps=StepSchedule(1, 0), guard=False)
    assert seen == [True, False, False] * 2


def test_a_failure_leaves_no_step_behind() -> None:
    with pytest.raises(ZeroDivisionError), scheduled(StepSchedule(1, 0), StepSchedule(1, 0), 4):
        raise ZeroDivisionError
    assert overrides() == (None, False)
    assert not attention_is_exact()


def test_attention_has_steps_of_its_own_and_those_of_the_layers() -> None:
    with scheduled(StepSchedule(0, 1), StepSchedule(1, 0), 3) as between:
        states = []
        for step in range(3):
            states.append((overrides()[1], attention_is_exact()))
            with between(step):
                assert (overrides()[1], attention_is_exact()) == (False, False), "callbacks are no part of a step"
    assert states == [(False, True), (False, False), (True, True)]


def test_fp8_attention_takes_bf16_where_it_is_to_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides it; the kernels themselves run on Hopper only."""
    seen: list[torch.dtype] = []
    monkeypatch.setattr(speed.attention, "_fa3", lambda q, *_: seen.append(q.dtype))
    q = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    attention = ATTENTIONS["fa3_fp8"]
    attention.run(q, q, q)
    assert _takes_fp8(attention, None)
    with exact_attention():
        attention.run(q, q, q)
        assert not _takes_fp8(attention, None)
    assert seen == [torch.float8_e4m3fn, torch.bfloat16]


@pytest.mark.slow
def test_bf16_attention_in_three_steps_takes_away_most_of_fp8_attentions_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 attention emulated: queries, keys and values are rounded as for the kernel, and the rest is exact."""

    def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        out: Tensor = ATTENTIONS["sdpa"].run(q.float(), k.float(), v.float(), mask, scale)
        return out.bfloat16()

    monkeypatch.setattr(speed.attention, "_fa3", exact)
    pipe = load("demo", device="cpu")
    speed.attention.set_attention(pipe.transformer, replace(ATTENTIONS["fa3_fp8"], name="emulated"))
    prompts = [prompt.text for prompt in read_prompts("demo")]
    latents = {
        text: paint(pipe, prompts, guard=False, bf16_attention_steps=StepSchedule.read(text)).latents.float()
        for text in ("8+0", "0+0", "1+1", "2+1")
    }
    errors = {
        text: float((own - latents["8+0"]).flatten(1).square().mean(1).sqrt().mean()) for text, own in latents.items()
    }
    print({text: f"{error:.4f}" for text, error in errors.items()})
    assert 0 < errors["2+1"] < errors["1+1"] < errors["0+0"]
    assert errors["2+1"] < 0.5 * errors["0+0"]


def gains(*falls: float) -> list[StepGain]:
    return [StepGain(step, 1.0, fall, 2.0) for step, fall in enumerate(falls)]


@pytest.mark.parametrize(
    ("falls", "schedule"),
    [
        ((4, 1, 1, 1), StepSchedule(1, 0)),
        ((1, 1, 1, 4), StepSchedule(0, 1)),
        ((3, 0, 0, 3), StepSchedule(1, 0)),
        ((2, 1, 1, 2.5), StepSchedule(1, 1)),
        ((1, 1, 4, 4, 1, 1), StepSchedule(3, 0)),
        ((-1, -1), None),
        ((5, -9), None),
    ],
)
def test_the_shortest_schedule_that_buys_half_is_advised(
    falls: tuple[float, ...], schedule: StepSchedule | None
) -> None:
    assert schedule_for(gains(*falls)) == schedule


def test_what_a_fall_costs() -> None:
    assert StepGain(0, 1.0, 0.5, 2.0).fall_per_ms == 0.25
    assert StepGain(0, 1.0, 0.5, -2.0).fall_per_ms == float("inf")
    assert StepGain(0, 1.0, -0.5, 0.0).fall_per_ms == -float("inf")


def test_sensitivity_says_what_each_step_buys() -> None:
    found = sensitivity("demo", "demo-nvfp4", layers="*.to_q", steps=2, device="cpu")
    assert [gain.step for gain in found.steps] == [0, 1]
    assert all(0 < gain.fall < gain.error for gain in found.steps)
    report = found.to_dict()
    assert report["bf16_steps"] == str(schedule_for(found.steps))
    assert [set(step) for step in report["steps"]] == [{"step", "error", "fall", "milliseconds", "fall_per_ms"}] * 2
    assert set(report["keep_bf16_by_ms"]) == set(report["keep_bf16"])


def test_no_step_is_ranked_where_nothing_is_rounded() -> None:
    found = sensitivity("demo", "demo-nvfp4,activations=bf16", layers="*.to_q", steps=1, device="cpu")
    assert (found.steps, found.bf16_steps, found.to_dict()["bf16_steps"]) == ((), None, None)


def test_a_candidate_may_have_a_schedule() -> None:
    _, plain, ends = read_sources("demo", ["demo-nvfp4", "demo-nvfp4,bf16_steps=2+1"])
    assert (plain.schedule, ends.schedule) == (StepSchedule(), StepSchedule(2, 1))
    _, wrong = read_sources("demo", ["demo-nvfp4,bf16_steps=2"])
    with pytest.raises(BadRequest, match="is no step schedule"):
        wrong.check()


def test_generate_takes_a_schedule_and_says_so_in_the_picture(tmp_path: Path) -> None:
    asked = ("generate", *PROMPT, "--transformer", "demo-nvfp4", "--steps", "2", "--device", "cpu", "--bf16-steps")
    file = tmp_path / "a.png"
    assert run(*asked, "1+0", "-o", str(file)).returncode == 0
    with Image.open(file) as picture:
        assert "1+0" in json.dumps(picture.info)
    done = run(*asked, "1", "-o", str(tmp_path / "b.png"))
    assert (done.returncode, "is no step schedule" in done.stderr) == (2, True)
    assert not (tmp_path / "b.png").exists()
