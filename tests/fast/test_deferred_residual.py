"""Blocks with deferred residuals compute what diffusers' blocks do, and compile as often.

FLUX.1's single blocks are in test_fuse_activations.py.
"""

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mezzotint.fast.passes.compile_blocks import compile_blocks
from mezzotint.fast.passes.deferred_residual import (
    DeferredResidual,
    DeferredResidualBlock,
    defer_residuals,
)
from support.deferred_residual_models import cast, four, with_ip_adapter
from support.modulation_models import GRAPHS, arguments, count_graphs, result, transformer

DEFERRING_ROWS = {"flux1": 1, "flux2": 2, "zimage": 1, "qwenimage": 1}
"""{family: number of its rows of blocks that can defer residuals without other passes}"""
WITH_FINAL_LAYER = {"flux2", "zimage", "qwenimage"}
"""Families whose last row is one of them, so that the final layer is wrapped too."""


@pytest.mark.parametrize("name", DEFERRING_ROWS)
def test_deferred_residuals_compute_the_same(name: str) -> None:
    model = four(name)
    inputs = arguments(name, model)
    expected = result(model, inputs)
    assert defer_residuals(model) == _deferring(name, 4)
    torch.testing.assert_close(result(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert result(model.bfloat16(), cast(inputs, torch.bfloat16)).isfinite().all()
    assert result(model.half(), cast(inputs, torch.float16)).isfinite().all()


def _deferring(name: str, blocks: int) -> int:
    return (blocks - 1) * DEFERRING_ROWS[name] + (name in WITH_FINAL_LAYER)


@pytest.mark.parametrize(
    ("name", "precompute"),
    [
        (name, precompute)
        for name in DEFERRING_ROWS
        for precompute in (False, True)
        if not precompute or name != "flux2"
    ],
)
def test_deferred_residuals_add_no_graph_per_block(name: str, precompute: bool) -> None:
    """The number of graphs depends on the final layer, which is compiled too, not on blocks."""

    def defer(model: Any) -> None:
        assert defer_residuals(model) == _deferring(name, 6)

    assert count_graphs(name, 6, precompute, defer) == GRAPHS[name] + (name in WITH_FINAL_LAYER)


def test_unsupported_rows_of_blocks_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer("zimage", 3)
    assert defer_residuals(model) == 0
    edit = four("qwenimage")
    monkeypatch.setattr(edit.transformer_blocks[1], "zero_cond_t", True)
    assert defer_residuals(edit) == 0
    assert defer_residuals(four("wan_ti2v")) == 0
    unfused = four("flux1")
    defer_residuals(unfused)
    assert not any(
        isinstance(block.forward, DeferredResidualBlock)
        for block in unfused.single_transformer_blocks
    )


def test_deferred_residual_supports_gate_and_sum_only() -> None:
    one, gate, deferred = (
        torch.ones(1, 2, 4),
        torch.full((1, 1, 4), 3.0),
        DeferredResidual(torch.ones(1, 2, 4)),
    )
    with pytest.raises(TypeError, match=r"deferred to the next block|DeferredResidual"):
        one / deferred
    with pytest.raises(TypeError, match=r"without a gate|DeferredResidual"):
        one + deferred
    total: Any = one + gate * deferred
    assert torch.equal(total.compute(), torch.full((1, 2, 4), 4.0))
    with pytest.raises(TypeError, match=r"deferred to the next block|DeferredResidual"):
        gate * total
    assert torch.equal((one + total).compute(), torch.full((1, 2, 4), 5.0))
    assert torch.equal((total + one).compute(), torch.full((1, 2, 4), 6.0))


@torch._dynamo.config.patch(recompile_limit=1)
def test_recompile_limit_is_raised() -> None:
    """With fullgraph=True, Dynamo raises an error beyond `recompile_limit` graphs of a function."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = four("flux2")
    defer_residuals(model)
    compile_blocks(model, fullgraph=True, backend=counter)
    result(model, arguments("flux2", model))
    assert counter.frame_count > 1


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(WITH_FINAL_LAYER))
def test_batch_may_share_one_time_step(name: str) -> None:
    model = four(name)
    inputs = arguments(name, model, 2)
    step = "t" if "t" in inputs else "timestep"
    inputs[step] = inputs[step][:1]
    expected = result(model, inputs)
    defer_residuals(model)
    torch.testing.assert_close(result(model, inputs), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_copy_of_a_model_has_its_own_weights() -> None:
    torch._dynamo.reset()
    model = four("zimage")
    inputs = arguments("zimage", model)
    defer_residuals(model)
    compile_blocks(model, fullgraph=True, backend="eager")
    expected = result(model, inputs)
    other = copy.deepcopy(model)
    for parameter in other.layers.parameters():
        parameter.zero_()
    assert not torch.equal(result(other, inputs), expected)
    assert torch.equal(result(model, inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_ip_adapter_output_is_added(compiled: bool) -> None:
    torch._dynamo.reset()
    model = four("flux1")
    inputs = arguments("flux1", model) | with_ip_adapter(model)
    expected = result(model, inputs)
    assert defer_residuals(model) == 3
    if compiled:
        compile_blocks(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(result(model, inputs), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gate_per_token_is_sliced_with_its_tokens() -> None:
    x, gate, branch = (torch.randn(2, 5, 4) for _ in range(3))
    total: Any = x + gate * DeferredResidual(branch)
    torch.testing.assert_close(total[:, 2:, ...].compute(), (x + gate * branch)[:, 2:])
