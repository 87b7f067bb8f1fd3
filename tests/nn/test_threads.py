"""Threads with separate pipelines or a shared one generate the images that each generates alone."""

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mezzotint.errors import BadRequest
from mezzotint.fast.passes.attention import bf16_attention
from mezzotint.fast.runtime.serial import Serial
from mezzotint.generation.generate import generate
from mezzotint.generation.pipeline import load, recommended_sampling
from mezzotint.generation.schedule import NO_STEPS, StepSchedule
from mezzotint.generation.turns import alone
from mezzotint.nn import (
    FusedLinear,
    FusedLinearSlice,
    QuantLinear,
    modes_of,
    unquantized_activations,
    use_backend,
)
from support.quant_tensors import fp8_tensor, nvfp4_tensor

PROMPT = ["a large red circle on a blue background"]
SMALL = recommended_sampling("demo").replace(steps=2, height=64)
DEFAULT = (None, False, False)
MODES: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "backend": lambda model: use_backend(model, "weight_only"),
    "inputs": unquantized_activations,
    "attention": bf16_attention,
}


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Return the results of the functions, each called in its own thread at the same time."""
    results: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda index=index, call=call: results.update({index: call()}))
        for index, call in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[place] for place in range(len(functions))]


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_belongs_to_one_model(mode: str) -> None:
    model, other = (
        nn.Sequential(QuantLinear(fp8_tensor()), QuantLinear(nvfp4_tensor())) for _ in "ab"
    )
    with MODES[mode](model):
        opened = modes_of(model).key
        assert opened != DEFAULT
        assert {modes_of(layer).key for layer in model} == {opened}
        assert in_threads(lambda: modes_of(model).key, lambda: modes_of(other).key) == [
            opened,
            DEFAULT,
        ]
        assert modes_of(copy.deepcopy(model)).key == DEFAULT
    assert modes_of(model).key == DEFAULT


@pytest.mark.parametrize("mode", MODES)
def test_another_thread_cannot_change_the_modes_of_a_model_in_use(mode: str) -> None:
    model, opened, tried = QuantLinear(fp8_tensor()), threading.Event(), threading.Event()

    def first() -> Any:
        with MODES[mode](model):
            opened.set()
            tried.wait(60)
            return modes_of(model).key

    def second() -> None:
        opened.wait(60)
        try:
            with pytest.raises(BadRequest, match="another thread"), MODES[mode](model):
                pass
        finally:
            tried.set()

    assert in_threads(first, second)[0] != DEFAULT
    with MODES[mode](model), MODES[mode](model):
        assert modes_of(model).key != DEFAULT
    assert modes_of(model).key == DEFAULT


@pytest.mark.parametrize("make", [fp8_tensor, nvfp4_tensor], ids=["fp8", "nvfp4"])
def test_compiled_code_sees_the_modes_of_its_model(make: Callable[[], Any]) -> None:
    layer = QuantLinear(make())
    x = torch.randn(3, layer.in_features)
    plain = layer(x)
    with unquantized_activations(layer):
        unquantized = layer(x)
    assert not torch.equal(plain, unquantized)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    for _ in range(2):
        assert torch.equal(compiled(x), plain)
        with unquantized_activations(layer):
            assert torch.equal(compiled(x), unquantized)
            assert torch.equal(torch.cat(in_threads(lambda: compiled(x))), unquantized)


def test_compiled_blocks_are_compiled_once_for_each_mode() -> None:
    """All blocks and models share the code: torch.compile guards on the values of their modes."""
    torch.compiler.reset()
    counter = CompileCounter()
    blocks = [nn.Sequential(QuantLinear(fp8_tensor(64, 64, seed))) for seed in range(4)]
    models = [nn.Sequential(*blocks[:2]), nn.Sequential(*blocks[2:])]
    for block in blocks:
        block.compile(fullgraph=True, backend=counter)
    x = torch.randn(3, 64)
    for _ in range(2):
        for model in models:
            model(x)
            with unquantized_activations(model):
                model(x)
                with use_backend(model, "weight_only"):
                    model(x)
    torch.compiler.reset()
    assert counter.frame_count == 3, "once for each mode, not for each block or model"


def latents(pipe: Any, seed: int, bf16_steps: StepSchedule = NO_STEPS, **given: Any) -> Tensor:
    generated = generate(
        pipe,
        PROMPT,
        seeds=[seed],
        sampling=SMALL,
        check_output=False,
        bf16_steps=bf16_steps,
        **given,
    )
    return generated.latents


def test_threads_with_pipelines_of_their_own_do_not_change_each_others_images() -> None:
    plain, other = (
        load("demo", transformer=name, device="cpu") for name in ("demo-nvfp4", "demo-fp8")
    )
    calls = [
        lambda: latents(plain, 0),
        lambda: latents(other, 1, StepSchedule(2, 0)),
    ]
    expected = [call() for call in calls]
    for _ in range(2):
        assert all(map(torch.equal, in_threads(*calls), expected))
    assert {modes_of(pipe.transformer).key for pipe in (plain, other)} == {DEFAULT}
    with unquantized_activations(plain.transformer):
        assert not torch.equal(calls[0](), expected[0])
        assert torch.equal(calls[1](), expected[1])


def test_threads_with_backends_and_schedules_of_their_own_do_not_change_each_others_images() -> (
    None
):
    pipes = [load("demo", transformer="demo-fp8", device="cpu") for _ in range(2)]
    backends, schedules = ("weight_only", "reference"), (StepSchedule(0, 1), StepSchedule(1, 0))

    def call(pipe: Any, backend: str, schedule: StepSchedule) -> Tensor:
        with use_backend(pipe.transformer, backend):
            return latents(pipe, 0, schedule)

    calls = [partial(call, *given) for given in zip(pipes, backends, schedules, strict=True)]
    expected = [each() for each in calls]
    assert not torch.equal(*expected)
    for _ in range(2):
        assert all(map(torch.equal, in_threads(*calls), expected))


def test_a_model_whose_modes_another_thread_has_changed_generates_nothing() -> None:
    pipe = load("demo", transformer="demo-fp8", device="cpu")
    refused: list[BadRequest] = []

    def generate_there() -> None:
        try:
            latents(pipe, 0)
        except BadRequest as error:
            refused.append(error)

    with use_backend(pipe.transformer, "weight_only"):
        in_threads(generate_there)
    assert "another thread" in str(refused[0])
    assert latents(pipe, 0).isfinite().all()


def test_threads_with_one_pipeline_take_turns() -> None:
    """Each thread has its own schedule."""
    pipe = load("demo", transformer="demo-nvfp4", device="cpu")
    schedules = (StepSchedule(), StepSchedule(1, 0), StepSchedule(2, 0))
    calls = [
        lambda seed=seed, steps=steps: latents(pipe, seed, steps)
        for seed, steps in enumerate(schedules)
    ]
    expected = [call() for call in calls]
    assert all(map(torch.equal, in_threads(*calls), expected))


def test_a_pipeline_is_not_called_from_within_its_own_call() -> None:
    pipe = load("demo", transformer="demo-nvfp4", device="cpu")
    with pytest.raises(BadRequest, match="called again while it generates"):
        latents(pipe, 0, on_step=lambda *_: latents(pipe, 1))
    with alone(pipe):
        pass


def test_a_callback_runs_without_the_schedules_modes() -> None:
    pipe = load("demo", transformer="demo-nvfp4", device="cpu")
    seen: list[Any] = []
    modes = modes_of(pipe.transformer)
    with use_backend(pipe.transformer, "reference"):
        latents(pipe, 0, StepSchedule(2, 0), on_step=lambda *_: seen.append(modes.key))
    assert seen == [("reference", False, False)] * 2


class Interrupted(nn.Module):
    """Two members of a group, with a pause between them in which another thread may come in."""

    def __init__(self, pauses: Sequence[Callable[[], Any]]) -> None:
        super().__init__()
        group = FusedLinear(QuantLinear(fp8_tensor(), torch.float32), [20, 28])
        self.members = nn.ModuleList(FusedLinearSlice(group, member) for member in range(2))
        self.pauses = list(pauses)

    def forward(self, x: Tensor) -> Tensor:
        first = self.members[0](x)
        if self.pauses:
            self.pauses.pop()()
        return torch.cat((first, self.members[1](x)), -1)


def test_calls_of_a_fast_model_are_one_after_another() -> None:
    """Its layers cache an output between calls, which another thread's call would replace."""
    running, waiting = threading.Event(), threading.Event()
    model = Interrupted([lambda: (running.set(), waiting.wait(0.2))])
    model.forward = Serial(model.forward)  # type: ignore[method-assign]
    xs = [torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    ended: list[int] = []

    def call(place: int) -> Tensor:
        if place == 1:
            running.wait(60)
        out: Tensor = model(xs[place])
        ended.append(place)
        return out

    got = in_threads(lambda: call(0), lambda: call(1))
    assert ended == [0, 1]
    assert all(torch.equal(y, model(x)) for y, x in zip(got, xs, strict=True))
