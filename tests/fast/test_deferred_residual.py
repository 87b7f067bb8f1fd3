"""Blocks that leave their last addition to the next one compute what diffusers' blocks do, and compile as often.

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
from support.modulation_models import arguments, compiles, result, transformer

LINKED = {"flux1": 1, "flux2": 2, "zimage": 1, "qwenimage": 1}
"""{family: how many rows of blocks it has that can be linked as diffusers has them}"""
LAST = {"flux2", "zimage", "qwenimage"}
"""Families whose last row is one of them, so that what follows the blocks is linked too."""


@pytest.mark.parametrize("name", LINKED)
def test_linked_blocks_compute_the_same(name: str) -> None:
    model = four(name)
    given = arguments(name, model)
    expected = result(model, given)
    assert defer_residuals(model) == _leaving(name, 4)
    torch.testing.assert_close(result(model, given), expected, rtol=1e-5, atol=1e-5)
    assert result(model.bfloat16(), cast(given, torch.bfloat16)).isfinite().all()
    assert result(model.half(), cast(given, torch.float16)).isfinite().all()


def _leaving(name: str, blocks: int) -> int:
    return (blocks - 1) * LINKED[name] + (name in LAST)


@pytest.mark.parametrize(
    ("name", "ahead"),
    [(name, ahead) for name in LINKED for ahead in (False, True) if not ahead or name != "flux2"],
)
def test_linked_blocks_are_compiled_no_more_often(name: str, ahead: bool) -> None:
    """However many there are; what follows them is compiled too."""

    def linked(model: Any) -> None:
        assert defer_residuals(model) == _leaving(name, 6)

    assert compiles(name, 6, ahead, linked) == compiles(name, 4, ahead) + (name in LAST)


def test_rows_that_cannot_be_linked_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer("zimage", 3)
    assert defer_residuals(model) == 0
    edit = four("qwenimage")
    monkeypatch.setattr(edit.transformer_blocks[1], "zero_cond_t", True)
    assert defer_residuals(edit) == 0
    assert defer_residuals(four("wan_ti2v")) == 0
    unread = four("flux1")
    defer_residuals(unread)
    assert not any(
        isinstance(block.forward, DeferredResidualBlock)
        for block in unread.single_transformer_blocks
    )


def test_a_sum_that_is_left_is_read_as_nothing_else() -> None:
    one, gate, left = (
        torch.ones(1, 2, 4),
        torch.full((1, 1, 4), 3.0),
        DeferredResidual(torch.ones(1, 2, 4)),
    )
    with pytest.raises(TypeError, match=r"left to the next block|DeferredResidual"):
        one / left
    with pytest.raises(TypeError, match=r"without a gate|DeferredResidual"):
        one + left
    total: Any = one + gate * left
    assert torch.equal(total.compute(), torch.full((1, 2, 4), 4.0))
    with pytest.raises(TypeError, match=r"left to the next block|DeferredResidual"):
        gate * total
    assert torch.equal((one + total).compute(), torch.full((1, 2, 4), 5.0))
    assert torch.equal((total + one).compute(), torch.full((1, 2, 4), 6.0))


@torch._dynamo.config.patch(recompile_limit=4)
def test_several_kinds_of_blocks_and_shapes_are_no_hard_limit() -> None:
    """Dynamo gives up on a function after so many graphs, with an error where whole graphs are asked for."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = four("flux2")
    defer_residuals(model)
    compile_blocks(model, fullgraph=True, backend=counter)
    for batch in (1, 2):
        result(model, arguments("flux2", model, batch))
    assert counter.frame_count > 4


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(LAST))
def test_a_batch_may_have_one_time_step(name: str) -> None:
    model = four(name)
    given = arguments(name, model, 2)
    step = "t" if "t" in given else "timestep"
    given[step] = given[step][:1]
    expected = result(model, given)
    defer_residuals(model)
    torch.testing.assert_close(result(model, given), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_copy_of_a_linked_model_has_weights_of_its_own() -> None:
    torch._dynamo.reset()
    model = four("zimage")
    given = arguments("zimage", model)
    defer_residuals(model)
    compile_blocks(model, fullgraph=True, backend="aot_eager")
    expected = result(model, given)
    other = copy.deepcopy(model)
    for parameter in other.layers.parameters():
        parameter.zero_()
    assert not torch.equal(result(other, given), expected)
    assert torch.equal(result(model, given), expected)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_what_an_ip_adapter_adds_is_added_too(compiled: bool) -> None:
    torch._dynamo.reset()
    model = four("flux1")
    given = arguments("flux1", model) | with_ip_adapter(model)
    expected = result(model, given)
    assert defer_residuals(model) == 3
    if compiled:
        compile_blocks(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(result(model, given), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_gate_for_every_token_is_sliced_with_its_tokens() -> None:
    x, gate, product = (torch.randn(2, 5, 4) for _ in range(3))
    total: Any = x + gate * DeferredResidual(product)
    torch.testing.assert_close(total[:, 2:, ...].compute(), (x + gate * product)[:, 2:])
