"""One source and one request: resolved once, the same defaults everywhere, results one by one."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from torch import Tensor
from typer.testing import CliRunner

import mezzotint
from mezzotint import builtin, hub
from mezzotint.cli import app
from mezzotint.cli.generate_options import GenerateOptions
from mezzotint.errors import BadOutput, BadRequest, Cancelled
from mezzotint.families import Sampling, families
from mezzotint.fast.passes.attention import ATTENTION_BACKENDS, set_attention, uses_fp8_attention
from mezzotint.generation import pipeline_index
from mezzotint.generation.cancel import CancelToken
from mezzotint.generation.generate import (
    effective_attention_steps,
    generate,
    generate_stream,
)
from mezzotint.generation.pipeline import load, recommended_sampling
from mezzotint.generation.request import Request
from mezzotint.generation.sampling_options import call_arguments
from mezzotint.generation.source import PipelineSource
from mezzotint.generation.step_schedule import NO_STEPS, StepSchedule
from mezzotint.nn import modes_of
from support.pipeline_cases import Case

PROMPTS = ["a large red circle on a blue background", "a small blue ring on a white background"]
SMALL = recommended_sampling("demo").replace(steps=2, height=64)


@pytest.fixture(scope="module")
def demo() -> Any:
    return load("demo", transformer="demo-fp8", device="cpu")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """{(function, argument): calls} of what resolves a name or reads an index."""
    found: Counter[tuple[str, str]] = Counter()

    def count(module: Any, name: str, modules: tuple[str, ...]) -> None:
        original = getattr(module, name)

        def counting(argument: Any, *rest: Any) -> Any:
            if isinstance(argument, str) or name != "resolve":
                found[name, str(argument)] += 1
            return original(argument, *rest)

        for place in modules:
            monkeypatch.setattr(f"mezzotint.{place}.{name}", counting)

    resolving = ("builtin", "checkpoint", "generation.source", "generation.pipeline")
    resolving += ("generation.transformer_planning", "quality.candidate")
    count(builtin, "resolve", resolving)
    count(pipeline_index, "read_index", ("generation.source", "generation.pipeline"))
    count(hub, "list_files", ("hub",))
    return found


def test_generate_resolves_its_model_once(
    counted: Counter[tuple[str, str]], tmp_path: Path
) -> None:
    command = ["generate", PROMPTS[0], "--transformer", "demo-fp8", "--steps", "1"]
    command += ["--device", "cpu", "-o", str(tmp_path / "a.png")]
    assert CliRunner().invoke(app, command).exit_code in (0, 1)
    index = ("read_index", str(builtin.demo_package().PIPELINE))
    assert counted == {("resolve", "demo"): 1, ("resolve", "demo-fp8"): 1, index: 1}


def test_compare_resolves_each_model_at_most_twice(
    counted: Counter[tuple[str, str]], tmp_path: Path
) -> None:
    mezzotint.compare(
        "demo",
        ["demo-fp8"],
        tmp_path / "report",
        steps=1,
        size={"width": 64, "height": 64},
        prompts=str(_prompt_file(tmp_path)),
        metrics=["psnr"],
        device="cpu",
    )
    assert set(counted.values()) <= {1, 2}
    assert ("resolve", "demo-fp8") in counted


def _prompt_file(folder: Path) -> Path:
    file = folder / "prompts.txt"
    file.write_text(PROMPTS[0])
    return file


def test_cli_and_api_have_the_same_defaults() -> None:
    request = Request(PROMPTS)
    options = GenerateOptions(prompts=PROMPTS)
    assert str(request.bf16_attention_steps) == "2+1"
    assert str(request.bf16_attention_steps) == options.bf16_attention_steps
    assert str(request.bf16_steps) == options.bf16_steps


def test_bf16_attention_steps_apply_where_attention_is_fp8() -> None:
    pipe = load("demo", device="cpu")
    request = Request(PROMPTS[:1], sampling=SMALL.replace(steps=5, guidance=1.0))
    assert not uses_fp8_attention(pipe.transformer)
    assert effective_attention_steps(pipe, request) == NO_STEPS
    set_attention(
        pipe.transformer,
        replace(ATTENTION_BACKENDS["sdpa"], name="emulated_fp8", accepts_fp8=True),
    )
    assert uses_fp8_attention(pipe.transformer)
    exact: list[bool] = []
    modes = modes_of(pipe.transformer)
    pipe.transformer.register_forward_pre_hook(lambda *_: exact.append(modes.bf16_attention))
    generate(pipe, request, check_output=False)
    assert exact == [True, True, False, False, True]
    exact.clear()
    generate(pipe, request, check_output=False, bf16_attention_steps=NO_STEPS)
    assert not any(exact)


def test_a_stream_yields_each_image_when_it_is_made(demo: Any) -> None:
    steps: list[int] = []
    request = Request(PROMPTS, seeds=[3, 4], sampling=SMALL, check_output=False)
    stream = generate_stream(demo, request, on_step=lambda step, _: steps.append(step))
    assert steps == []
    first = next(stream)
    assert (steps, len(first.images), first.latents.shape[0]) == ([0, 1], 1, 1)
    second = next(stream)
    assert steps == [0, 1, 2, 3]
    whole = generate(demo, request)
    assert torch.equal(whole.latents, torch.cat([first.latents, second.latents]))
    assert [image.tobytes() for image in whole.images] == [
        image.tobytes() for result in (first, second) for image in result.images
    ]


def test_a_bad_image_is_reported_before_the_next_one_is_made(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mezzotint.generation.generate.find_problems", lambda *_: ("is bad",))
    steps: list[int] = []
    with pytest.raises(BadOutput, match="is bad"):
        generate(demo, PROMPTS, sampling=SMALL, on_step=lambda step, _: steps.append(step))
    assert steps == [0, 1]


@pytest.mark.parametrize("cancelled_at", [0, 2])
def test_a_generation_is_cancelled_between_steps(demo: Any, cancelled_at: int) -> None:
    token, steps = CancelToken(), []

    def on_step(step: int, _latents: Tensor) -> None:
        steps.append(step)
        if step == cancelled_at:
            token.cancel()

    request = Request(PROMPTS, sampling=SMALL, check_output=False)
    with pytest.raises(Cancelled):
        generate(demo, request, on_step=on_step, cancel=token)
    assert steps == list(range(cancelled_at + 1))
    with pytest.raises(Cancelled):
        generate(demo, request, on_step=on_step, cancel=token)
    assert steps == list(range(cancelled_at + 1)), "no step after it"
    assert not modes_of(demo.transformer).bf16_attention
    assert generate(demo, request).latents.isfinite().all()


def test_settings_that_a_pipeline_does_not_take_are_refused(cases: Callable[[str], Case]) -> None:
    for model, settings, message in (
        ("demo", {"guidance_2": 3.0}, "FluxPipeline takes no guidance_scale_2"),
        ("demo", {"negative_prompt": "blur"}, "ignores the negative prompt.*true_cfg_scale is 1"),
        ("flux2", {"negative_prompt": "blur"}, "Flux2Pipeline takes no negative_prompt"),
        ("flux2", {"flow_shift": 3.0}, "computes its flow shift from the size"),
        ("zimage", {"true_cfg_scale": 3.0}, "ZImagePipeline takes no true_cfg_scale"),
        ("zimage", {"negative_prompt": "blur"}, "ignores the negative prompt.*guidance_scale is 0"),
        ("wan_ti2v", {"guidance_2": 3.0}, "has only one"),
    ):
        opened = PipelineSource.open("demo" if model == "demo" else cases(model).folder)
        with pytest.raises(BadRequest, match=message):
            opened.sampling(**settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("flux1", {"negative_prompt": "blur", "true_cfg_scale": 4.0}),
        ("flux1", {"true_cfg_scale": 4.0}),
        ("wan_a14b", {"guidance_2": 2.0}),
        ("wan_a14b", {"negative_prompt": "blur"}),
        ("zimage", {"negative_prompt": "blur", "guidance": 3.0}),
        ("wan_ti2v", {"flow_shift": 9.0}),
        ("zimage", {"flow_shift": 9.0}),
    ],
)
def test_settings_that_a_pipeline_takes_change_the_image(
    cases: Callable[[str], Case], name: str, settings: dict[str, Any]
) -> None:
    case = cases(name)
    scheduler = case.reference.scheduler.config

    def latents(sampling: Any) -> Tensor:
        result = generate(case.reference, ["rain"], sampling=sampling, check_output=False)
        return result.latents

    plain = latents(case.sampling)
    assert not torch.equal(latents(case.sampling.replace(**settings)), plain)
    assert torch.equal(latents(case.sampling), plain), "nothing is left of a request"
    assert case.reference.scheduler.config == scheduler


def test_qwen_image_takes_its_guidance_as_true_cfg() -> None:
    sampling = Sampling(height=32, steps=2, guidance=4.0)
    expected = {"true_cfg_scale": 4.0, "negative_prompt": [" "]}
    for settings, changed in (
        ({}, {}),
        ({"negative_prompt": "blur"}, {"negative_prompt": ["blur"]}),
        ({"true_cfg_scale": 7.0}, {"true_cfg_scale": 7.0}),
    ):
        arguments = call_arguments(
            QwenImagePipeline, {}, families()["qwenimage"], sampling.replace(**settings)
        )
        assert arguments.items() >= (expected | changed).items()


def test_the_command_passes_settings_on(tmp_path: Path) -> None:
    command = ["generate", PROMPTS[0], "--steps", "1", "--device", "cpu"]
    command += ["--negative-prompt", "a ring", "--true-cfg", "3", "--flow-shift", "2"]
    result = CliRunner().invoke(app, [*command, "--json", "-o", str(tmp_path / "a.png")])
    for setting in ('"negative_prompt": "a ring"', '"true_cfg_scale": 3.0', '"flow_shift": 2.0'):
        assert setting in result.stdout
    refused = CliRunner().invoke(app, [*command, "--guidance-2", "3"])
    assert isinstance(refused.exception, BadRequest)


def test_requests_are_checked() -> None:
    with pytest.raises(BadRequest, match="2 prompts and 1 seeds"):
        Request(PROMPTS, seeds=[1])
    with pytest.raises(BadRequest, match="one string"):
        Request("a cat")
    request = Request.of(Request(PROMPTS), bf16_steps=StepSchedule(1, 0))
    assert (request.prompts, request.bf16_steps) == (PROMPTS, StepSchedule(1, 0))
    assert [(seed, image) for _, seed, image in request] == [(0, None), (1, None)]
