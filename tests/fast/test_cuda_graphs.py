"""CUDA graphs with a fake GPU that records operations; tests/gpu/test_gpu.py has a real one."""

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
    """A fake CUDA graph: `replay` repeats recorded operations and writes to the same outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, results))
        return results

    def replay(self) -> None:
        for function, args, kwargs, results in self.operations:
            again = function(*args, **kwargs)
            for output, value in zip(
                pytree.tree_leaves(results), pytree.tree_leaves(again), strict=True
            ):
                if isinstance(output, Tensor):
                    output.copy_(value)


class Stream:
    def wait_stream(self, _other: "Stream") -> None:
        pass


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the memory pools that recordings were made in."""
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
def cpu_tensors_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept tensors on the CPU."""
    monkeypatch.setattr(cuda_graphs, "_check_on_cuda", lambda _leaves: None)


class CountedModule(nn.Module):
    """A module that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Sequential(nn.Linear(4, 4), nn.GELU()).requires_grad_(False), 0

    def forward(self, x: Tensor, pair: tuple[Tensor, float] | None = None) -> dict[str, Tensor]:
        self.calls += 1
        y = self.inner(x)
        return {"y": y if pair is None else y + pair[0] * pair[1]}


def test_call_is_recorded_once_per_shape_and_state(
    pools: list[int], cpu_tensors_allowed: None
) -> None:
    model, state = CountedModule(), ["one"]
    runner = CudaGraphRunner(model, lambda: state[0], model)

    def calls(*args: Any) -> int:
        before = model.calls
        got = runner(*args)["y"]
        new_calls = model.calls - before
        assert torch.equal(got, model(*args)["y"])
        return new_calls

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
    kept = runner(x(2))["y"]
    before = kept.clone()
    runner(x(2))
    assert torch.equal(kept, before), "a replay must not overwrite earlier results"


def test_replaced_weights_drop_recordings_and_pool(
    pools: list[int], cpu_tensors_allowed: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = CountedModule()
    runner = CudaGraphRunner(model, lambda: None, model)
    x = torch.randn(2, 4)
    for _ in range(2):
        runner(x)
        assert model.calls == 3
    model.inner[0] = nn.Linear(4, 4).requires_grad_(False)
    for _ in range(2):
        assert torch.equal(runner(x)["y"], model.inner(x))
        assert model.calls == 6
    assert len(caplog.records) == 1
    assert pools == [0, 1]
    assert len(runner.recordings) == 1


def test_cpu_tensors_are_an_error_and_keep_recordings(
    pools: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = CountedModule()
    with pytest.raises(BadRequest, match="called with a tensor on cpu"):
        CudaGraphRunner(model, lambda: None, model)(torch.randn(2, 4))
    assert (model.calls, pools, caplog.records) == (0, [], [])


@pytest.mark.parametrize("name", TINY)
def test_recorded_calls_read_precomputed_outputs(
    name: str, pools: list[int], cpu_tensors_allowed: None, caplog: pytest.LogCaptureFixture
) -> None:
    plain = transformer(name)
    fast: Any = copy.deepcopy(plain)
    runner = fast.forward = CudaGraphRunner(fast.forward, lambda: modes_of(fast).key, fast)
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
    assert len(runner.recordings) == 1
    assert not [record for record in caplog.records if record.name == cuda_graphs.LOG.name]
