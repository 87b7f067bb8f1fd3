"""Recordings, with a GPU that is a tape of what PyTorch is asked to do; on a real one, tests/gpu/test_gpu.py."""

import copy
from contextlib import nullcontext
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mezzotint.errors import BadRequest
from mezzotint.fast.passes.cached_text_refiner import cache_text_refiner
from mezzotint.fast.passes.precomputed_modulation import precompute_modulation
from mezzotint.fast.runtime import cuda_graphs
from mezzotint.fast.runtime.cuda_graphs import CudaGraphRunner
from mezzotint.nn import modes_of
from support.modulation_models import SCHEDULE, TINY, arguments, result, transformer


class Tape(TorchDispatchMode):
    """In the place of a CUDA graph: does again what was done while it was open, with results where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for function, args, kwargs, made in self.done:
            again = function(*args, **kwargs)
            for place, value in zip(
                pytree.tree_leaves(made), pytree.tree_leaves(again), strict=True
            ):
                if isinstance(place, Tensor):
                    place.copy_(value)


class Stream:
    def wait_stream(self, _other: "Stream") -> None:
        pass


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pools of memory that recordings were made in."""
    used: list[int] = []
    numbers = count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(numbers))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(
        torch.cuda, "graph", lambda tape, pool, capture_error_mode: (used.append(pool), tape)[1]
    )
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    return used


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are as good as others."""
    monkeypatch.setattr(cuda_graphs, "_check_on_cuda", lambda _leaves: None)


class Counted(nn.Module):
    """A module that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Sequential(nn.Linear(4, 4), nn.GELU()).requires_grad_(False), 0

    def forward(self, x: Tensor, pair: tuple[Tensor, float] | None = None) -> dict[str, Tensor]:
        self.calls += 1
        y = self.inner(x)
        return {"y": y if pair is None else y + pair[0] * pair[1]}


def test_a_call_is_recorded_once_for_each_shape_and_state(pools: list[int], anywhere: None) -> None:
    model, state = Counted(), ["one"]
    recorded = CudaGraphRunner(model, lambda: state[0], model)

    def calls(*args: Any) -> int:
        before = model.calls
        got = recorded(*args)["y"]
        made = model.calls - before
        assert torch.equal(got, model(*args)["y"])
        return made

    def x(rows: int) -> Tensor:
        return torch.randn(rows, 4)

    assert [calls(x(2)), calls(x(2)), calls(x(3)), calls(x(3)), calls(x(2))] == [3, 0, 3, 0, 0]
    assert [calls(x(2), (x(2), 2.0)), calls(x(2), (x(2), 2.0)), calls(x(2), (x(2), 3.0))] == [
        3,
        0,
        3,
    ]
    state[0] = "other"
    assert [calls(x(2)), calls(x(2))] == [3, 0]
    assert len(set(pools)) == 1
    kept = recorded(x(2))["y"]
    before = kept.clone()
    recorded(x(2))
    assert torch.equal(kept, before), "a result is the caller's own"


def test_all_is_recorded_anew_in_another_pool_when_weights_are_others(
    pools: list[int], anywhere: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = Counted()
    recorded = CudaGraphRunner(model, lambda: None, model)
    x = torch.randn(2, 4)
    for _ in range(2):
        recorded(x)
        assert model.calls == 3
    model.inner[0] = nn.Linear(4, 4).requires_grad_(False)
    for _ in range(2):
        assert torch.equal(recorded(x)["y"], model.inner(x))
        assert model.calls == 6
    assert len(caplog.records) == 1
    assert pools == [0, 1]
    assert len(recorded.recordings) == 1


def test_tensors_on_the_cpu_are_refused_before_anything_is_forgotten(
    pools: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = Counted()
    with pytest.raises(BadRequest, match="called with a tensor on cpu"):
        CudaGraphRunner(model, lambda: None, model)(torch.randn(2, 4))
    assert (model.calls, pools, caplog.records) == (0, [], [])


@pytest.mark.parametrize("name", TINY)
def test_what_is_worked_out_ahead_is_found_by_what_was_recorded(
    name: str, pools: list[int], anywhere: None, caplog: pytest.LogCaptureFixture
) -> None:
    plain = transformer(name)
    fast: Any = copy.deepcopy(plain)
    recorded = fast.forward = CudaGraphRunner(fast.forward, lambda: modes_of(fast).key, fast)
    cache_text_refiner(fast)
    assert (
        precompute_modulation(
            fast,
            SCHEDULE,
            lambda function, layers: CudaGraphRunner(function, lambda: modes_of(fast).key, layers),
        )
        > 0
    )
    inputs = arguments(name, plain)
    step = "t" if "t" in inputs else "timestep"
    for value in (0.9, 0.8, 0.85, 0.7, 0.9, 0.1):
        inputs[step] = torch.tensor([value])
        torch.testing.assert_close(
            result(fast, inputs), result(plain, inputs), rtol=1e-4, atol=1e-4
        )
    assert len(recorded.recordings) == 1
    assert not [record for record in caplog.records if record.name == cuda_graphs.LOG.name]
