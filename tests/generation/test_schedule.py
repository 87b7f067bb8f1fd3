"""Step schedules: which steps leave inputs in BF16, what a layer does then, and what that buys."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from mezzotint import fast
from mezzotint.errors import BadRequest
from mezzotint.fast.passes.attention import (
    ATTENTION_BACKENDS,
    AttentionBackend,
    FastAttnProcessor,
    bf16_attention,
    set_attention,
)
from mezzotint.fast.passes.attention_processors import _use_fp8
from mezzotint.generation.generate import generate
from mezzotint.generation.pipeline import load, recommended_sampling
from mezzotint.generation.schedule import StepSchedule, apply_schedule
from mezzotint.kernels import BF16_ACTIVATIONS, Can
from mezzotint.nn import (
    QuantLinear,
    modes_of,
    unquantized_activations,
    use_backend,
)
from mezzotint.quality.candidate import parse_sources
from mezzotint.quality.prompts import read_prompts
from mezzotint.quality.sensitivity import sensitivity
from mezzotint.quality.sensitivity.steps import StepGain, schedule_for
from support.cli_runner import run
from support.quant_tensors import fp8_tensor, nvfp4_tensor

DEFAULT = (None, False, False)
PROMPT = ["a large red circle on a blue background"]
SMALL = recommended_sampling("demo").replace(steps=3, height=64)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60))
def test_a_schedule_covers_both_ends(first: int, last: int, steps: int) -> None:
    covered = [StepSchedule(first, last).covers(step, steps) for step in range(steps)]
    assert covered == [
        step in {*range(steps)[:first], *range(steps)[steps - min(last, steps) :]}
        for step in range(steps)
    ]


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_what_is_written_is_read(first: int, last: int) -> None:
    assert StepSchedule.parse(str(StepSchedule(first, last))) == StepSchedule(first, last)


@pytest.mark.parametrize("text", ["", "2", "2,1", "-1+2", "2+1+0", "a+b", "2 + 1"])
def test_an_invalid_schedule_is_an_error(text: str) -> None:
    with pytest.raises(BadRequest, match="is not a step schedule"):
        StepSchedule.parse(text)


@pytest.mark.parametrize("make", [fp8_tensor, nvfp4_tensor], ids=["fp8", "nvfp4"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_unquantized_inputs_are_those_of_bf16_activations(make: Any, compiled: bool) -> None:
    layer, unquantized = QuantLinear(make()), QuantLinear(make(), activations=BF16_ACTIVATIONS)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    quantized = run(x)
    with unquantized_activations(layer):
        assert torch.equal(run(x), unquantized(x))
        with use_backend(layer, "reference"):
            assert modes_of(layer).key == ("reference", True, False)
            assert torch.equal(run(x), unquantized(x))
    assert not torch.equal(quantized, unquantized(x))
    assert torch.equal(run(x), quantized)
    assert modes_of(layer).key == DEFAULT


def test_a_layer_whose_inputs_are_not_quantized_stays_on_its_backend() -> None:
    assert QuantLinear(fp8_tensor(), activations=BF16_ACTIVATIONS).bf16_activation_backend is None


def trajectory(activations: str, schedule: StepSchedule) -> list[Tensor]:
    pipe = load("demo", transformer="demo-nvfp4", device="cpu", activations=activations)
    latents: list[Tensor] = []
    generate(
        pipe,
        PROMPT,
        sampling=SMALL,
        on_step=lambda _, now: latents.append(now),
        bf16_steps=schedule,
        check_output=False,
    )
    assert modes_of(pipe.transformer).key == DEFAULT
    return latents


def test_each_step_runs_as_the_schedule_says() -> None:
    stored, bf16 = (
        trajectory(activations, StepSchedule()) for activations in ("as_stored", "bf16")
    )
    whole, ends = (
        trajectory("as_stored", StepSchedule(3, 3)),
        trajectory("as_stored", StepSchedule(1, 1)),
    )
    assert all(map(torch.equal, whole, bf16))
    assert torch.equal(ends[0], bf16[0])
    assert not torch.equal(ends[1], bf16[1])
    error = [float(torch.dist(latents[-1], bf16[-1])) for latents in (ends, stored)]
    assert 0 < error[0] < error[1]


def test_every_image_follows_the_schedule_from_its_first_step() -> None:
    pipe = load("demo", transformer="demo-nvfp4", device="cpu")
    seen: list[bool] = []
    modes = modes_of(pipe.transformer)
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(modes.bf16_activations))
    generate(
        pipe,
        PROMPT * 2,
        sampling=SMALL.replace(guidance=1.0),
        bf16_steps=StepSchedule(1, 0),
        check_output=False,
    )
    assert seen == [True, False, False] * 2


def fail_with(modes: tuple[object, ...], layer: QuantLinear) -> None:
    assert modes_of(layer).key == modes
    raise ZeroDivisionError


def test_a_failure_leaves_no_step_behind() -> None:
    layer = QuantLinear(fp8_tensor())
    with (
        pytest.raises(ZeroDivisionError),
        apply_schedule([layer], StepSchedule(1, 0), StepSchedule(1, 0), 4),
    ):
        fail_with((None, True, True), layer)
    assert modes_of(layer).key == DEFAULT


def test_attention_has_steps_of_its_own_and_those_of_the_layers() -> None:
    layers = [QuantLinear(fp8_tensor()), QuantLinear(nvfp4_tensor())]
    with apply_schedule(layers, StepSchedule(0, 1), StepSchedule(1, 0), 3) as between:
        states = []
        for step in range(3):
            assert modes_of(layers[0]).key == modes_of(layers[1]).key
            states.append(modes_of(layers[0]).key[1:])
            with between(step):
                assert modes_of(layers[0]).key == DEFAULT, "callbacks are no part of a step"
    assert states == [(False, True), (False, False), (True, True)]


def emulated_fp8_attention() -> AttentionBackend:
    """FP8 attention on a CPU: operands are quantized as for the kernel, the rest is exact."""

    def exact(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        return fast.passes.attention._fa3(query, key, value, attn_mask, scale)

    bf16 = AttentionBackend("emulated_bf16", exact, lambda _target: Can())
    return replace(ATTENTION_BACKENDS["fa3_fp8"], name="emulated", bf16=bf16)


def test_bf16_attention_replaces_fp8_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks which dtype the kernels get; they run on Hopper only."""
    seen: list[torch.dtype] = []
    monkeypatch.setattr(fast.passes.attention, "_fa3", lambda q, *_: seen.append(q.dtype))
    q = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    model, diffusers_own = nn.Sequential(nn.Identity(), nn.Identity()), SimpleNamespace()
    diffusers_own._attention_backend = None
    model[0].processor, model[1].processor = (
        FastAttnProcessor(ATTENTION_BACKENDS["sdpa"]),
        diffusers_own,
    )
    set_attention(model, emulated_fp8_attention())

    def run() -> bool:
        attention = model[0].processor.attention
        attention.run(q, q, q)
        dispatch_attention_fn(q, q, q, backend=diffusers_own._attention_backend)
        return _use_fp8(attention, None)

    assert run()
    with bf16_attention(model):
        assert not run()
    assert run()
    assert seen == [torch.float8_e4m3fn] * 2 + [torch.bfloat16] * 2 + [torch.float8_e4m3fn] * 2


@pytest.mark.slow
def test_bf16_attention_in_three_steps_takes_away_most_of_fp8_attentions_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Emulate FP8 attention: Q, K and V are quantized as for the kernel, the rest is exact."""

    def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        out: Tensor = ATTENTION_BACKENDS["sdpa"].run(q.float(), k.float(), v.float(), mask, scale)
        return out.bfloat16()

    monkeypatch.setattr(fast.passes.attention, "_fa3", exact)
    pipe = load("demo", device="cpu")
    set_attention(pipe.transformer, emulated_fp8_attention())
    prompts = [prompt.text for prompt in read_prompts("demo")]
    latents = {
        text: generate(
            pipe, prompts, check_output=False, bf16_attention_steps=StepSchedule.parse(text)
        ).latents.float()
        for text in ("8+0", "0+0", "1+1", "2+1")
    }
    errors = {
        text: float((result - latents["8+0"]).flatten(1).square().mean(1).sqrt().mean())
        for text, result in latents.items()
    }
    print({text: f"{error:.4f}" for text, error in errors.items()})
    assert 0 < errors["2+1"] < errors["1+1"] < errors["0+0"]
    assert errors["2+1"] < 0.5 * errors["0+0"]


def gains(*reductions: float) -> list[StepGain]:
    return [StepGain(step, 1.0, reduction, 2.0) for step, reduction in enumerate(reductions)]


@pytest.mark.parametrize(
    ("reductions", "schedule"),
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
def test_the_shortest_schedule_with_half_of_the_reduction_is_recommended(
    reductions: tuple[float, ...], schedule: StepSchedule | None
) -> None:
    assert schedule_for(gains(*reductions)) == schedule


def test_error_reduction_per_millisecond() -> None:
    assert StepGain(0, 1.0, 0.5, 2.0).error_reduction_per_ms == 0.25
    assert StepGain(0, 1.0, 0.5, -2.0).error_reduction_per_ms == float("inf")
    assert StepGain(0, 1.0, -0.5, 0.0).error_reduction_per_ms == -float("inf")


def test_sensitivity_reports_the_effect_of_each_step() -> None:
    found = sensitivity("demo", "demo-nvfp4", layers="*.to_q", steps=2, device="cpu")
    assert [gain.step for gain in found.steps] == [0, 1]
    assert all(0 < gain.error_reduction < gain.error for gain in found.steps)
    report = found.to_dict()
    assert report["bf16_steps"] == str(schedule_for(found.steps))
    assert [set(step) for step in report["steps"]] == [
        {"step", "error", "error_reduction", "milliseconds", "error_reduction_per_ms"}
    ] * 2
    assert set(report["keep_bf16_by_ms"]) == set(report["keep_bf16"])


def test_no_step_is_ranked_without_quantized_activations() -> None:
    found = sensitivity(
        "demo", "demo-nvfp4,activations=bf16", layers="*.to_q", steps=1, device="cpu"
    )
    assert (found.steps, found.bf16_steps, found.to_dict()["bf16_steps"]) == ((), None, None)


def test_a_candidate_may_have_a_schedule() -> None:
    _, plain, ends = parse_sources("demo", ["demo-nvfp4", "demo-nvfp4,bf16_steps=2+1"])
    assert (plain.schedule, ends.schedule) == (StepSchedule(), StepSchedule(2, 1))
    _, wrong = parse_sources("demo", ["demo-nvfp4,bf16_steps=2"])
    with pytest.raises(BadRequest, match="is not a step schedule"):
        wrong.check()


def test_generate_takes_a_schedule_and_says_so_in_the_image(tmp_path: Path) -> None:
    asked = (
        "generate",
        *PROMPT,
        "--transformer",
        "demo-nvfp4",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--bf16-steps",
    )
    file = tmp_path / "a.png"
    assert run(*asked, "1+0", "-o", str(file)).returncode == 0
    with Image.open(file) as image:
        assert "1+0" in json.dumps(image.info)
    done = run(*asked, "1", "-o", str(tmp_path / "b.png"))
    assert (done.returncode, "is not a step schedule" in done.stderr) == (2, True)
    assert not (tmp_path / "b.png").exists()
