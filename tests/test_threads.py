"""Threads with pipelines of their own, or with one together: each image is what it is alone."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.errors import BadRequest
from mezzotint.nn import (
    GroupedLinear,
    LinearGroup,
    QuantLinear,
    attention_is_exact,
    exact_attention,
    overrides,
    unrounded_inputs,
    use_backend,
)
from mezzotint.painting import paint
from mezzotint.pipelines import load, sampling_of
from mezzotint.schedule import NO_STEPS, StepSchedule
from mezzotint.speed.serial import Serial
from mezzotint.turns import alone
from test_kernels import fp8_tensor, nvfp4_tensor

PROMPT = ["a large red circle on a blue background"]
SMALL = sampling_of("demo").but(steps=2, size=64)
PLAIN = ((None, False), False)
MODES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "backend": lambda: use_backend("weight_only"),
    "inputs": unrounded_inputs,
    "attention": exact_attention,
}


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """What the functions return, each from a thread of its own, all at once."""
    results: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda own=own, place=place: results.update({place: own()}))
        for place, own in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[place] for place in range(len(functions))]


def state() -> tuple[Any, bool]:
    return overrides(), attention_is_exact()


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_its_threads_own(mode: str) -> None:
    opened, looked = threading.Event(), threading.Event()

    def open_it() -> Any:
        with MODES[mode]():
            opened.set()
            looked.wait(60)
            within = state()
        return within, state()

    def look() -> Any:
        opened.wait(60)
        seen = state()
        looked.set()
        return seen

    (within, after), seen = in_threads(open_it, look)
    assert within != PLAIN
    assert (seen, after, state()) == (PLAIN, PLAIN, PLAIN)
    with MODES[mode]():
        assert in_threads(state) == [PLAIN]
        assert state() == within


@pytest.mark.parametrize("mode", ["backend", "inputs"])
def test_modes_that_close_in_another_order_than_they_opened_leave_nothing(mode: str) -> None:
    """As those of requests on several threads do."""
    first_open, second_open, first_closed = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with MODES[mode]():
            first_open.set()
            second_open.wait(60)
        first_closed.set()

    def second() -> Any:
        first_open.wait(60)
        with MODES[mode]():
            second_open.set()
            first_closed.wait(60)
        return state()

    assert in_threads(first, second)[1] == PLAIN
    assert state() == PLAIN


@pytest.mark.parametrize("make", [fp8_tensor, nvfp4_tensor], ids=["fp8", "nvfp4"])
def test_compiled_code_sees_the_modes_of_the_thread_that_runs_it(make: Callable[[], Any]) -> None:
    layer = QuantLinear(make())
    x = torch.randn(3, layer.in_features)
    plain = layer(x)
    with unrounded_inputs():
        unrounded = layer(x)
    assert not torch.equal(plain, unrounded)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def with_mode() -> Tensor:
        with unrounded_inputs():
            out: Tensor = compiled(x)
        return out

    for _ in range(2):
        assert torch.equal(compiled(x), plain)
        assert all(map(torch.equal, in_threads(with_mode, lambda: compiled(x)), (unrounded, plain)))


def latents(pipe: Any, seed: int, bf16_steps: StepSchedule = NO_STEPS, **given: Any) -> Tensor:
    painting = paint(pipe, PROMPT, [seed], sampling=SMALL, guard=False, bf16_steps=bf16_steps, **given)
    return painting.latents


def test_threads_with_pipelines_of_their_own_do_not_change_each_others_images() -> None:
    plain, other = (load("demo", transformer=name, device="cpu") for name in ("demo-nvfp4", "demo-fp8"))
    calls = [
        lambda: latents(plain, 0),
        lambda: latents(other, 1, StepSchedule(2, 0)),
    ]
    expected = [call() for call in calls]
    for _ in range(2):
        assert all(map(torch.equal, in_threads(*calls), expected))
    assert state() == PLAIN
    assert torch.equal(calls[0](), expected[0])
    with unrounded_inputs():
        assert not torch.equal(calls[0](), expected[0])
        assert torch.equal(*in_threads(calls[0]), expected[0])


def test_threads_with_one_pipeline_take_turns() -> None:
    """And each has its own schedule."""
    pipe = load("demo", transformer="demo-nvfp4", device="cpu")
    schedules = (StepSchedule(), StepSchedule(1, 0), StepSchedule(2, 0))
    calls = [lambda seed=seed, own=own: latents(pipe, seed, own) for seed, own in enumerate(schedules)]
    expected = [call() for call in calls]
    assert all(map(torch.equal, in_threads(*calls), expected))


def test_a_pipeline_is_not_called_from_within_its_own_call() -> None:
    pipe = load("demo", transformer="demo-nvfp4", device="cpu")
    with pytest.raises(BadRequest, match="from within one"):
        latents(pipe, 0, on_step=lambda *_: latents(pipe, 1))
    with alone(pipe):
        pass


def test_a_callback_runs_without_the_schedules_modes() -> None:
    pipe = load("demo", transformer="demo-nvfp4", device="cpu")
    seen: list[Any] = []
    with use_backend("reference"):
        latents(pipe, 0, StepSchedule(2, 0), on_step=lambda *_: seen.append(state()))
    assert seen == [(("reference", False), False)] * 2


class Interrupted(nn.Module):
    """Two members of a group, with a pause between them in which another thread may come in."""

    def __init__(self, pauses: Sequence[Callable[[], Any]]) -> None:
        super().__init__()
        group = LinearGroup(QuantLinear(fp8_tensor(), torch.float32), [20, 28])
        self.members = nn.ModuleList(GroupedLinear(group, member) for member in range(2))
        self.pauses = list(pauses)

    def forward(self, x: Tensor) -> Tensor:
        first = self.members[0](x)
        if self.pauses:
            self.pauses.pop()()
        return torch.cat((first, self.members[1](x)), -1)


def test_calls_of_a_fast_model_are_one_after_another() -> None:
    """Its layers keep a product from one call to the next, which another thread's call would replace."""
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
    assert all(torch.equal(own, model(x)) for own, x in zip(got, xs, strict=True))
