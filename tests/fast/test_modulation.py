"""Modulation worked out for all steps ahead gives, at every step, the numbers that each block's own layers give."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mezzotint.fast import speed_up
from mezzotint.fast.passes.cached_text_refiner import cache_text_refiner
from mezzotint.fast.passes.precomputed_modulation import precompute_modulation
from mezzotint.fast.runtime import modulation
from mezzotint.fast.runtime.modulation import (
    MAX_STEPS,
    PrecomputedLinear,
    PrecomputedModulation,
    run_in_chunks,
)
from mezzotint.fast.runtime.tensor_cache import MAX_ENTRIES, TensorCache
from mezzotint.generation.generate import generate
from mezzotint.generation.schedule import StepSchedule
from mezzotint.nn import QuantLinear, unquantized_activations
from support import tiny_pipelines as tiny
from support.checkpoint_makers import MAKERS
from support.modulation_models import SCHEDULE, TINY, arguments, compiles, result, transformer
from support.pipeline_cases import PROMPTS, Case
from support.quant_tensors import fp8_tensor


@pytest.fixture
def row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of one step at a time: a CPU sums a product with eight rows in another order than one with one."""
    monkeypatch.setattr(modulation, "GEMV_MAX_ROWS", 1)


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each table has that is made during the test."""
    made: list[int] = []
    rows = PrecomputedModulation._compute_outputs

    def counted(self: PrecomputedModulation, call: Any, steps: Tensor) -> Tensor:
        made.append(len(steps))
        return rows(self, call, steps)

    monkeypatch.setattr(PrecomputedModulation, "_compute_outputs", counted)
    return made


@pytest.mark.parametrize(
    ("name", "tables"), [("flux1", [4, 3] * 2), ("zimage", [4, 3]), ("qwenimage", [4, 3])]
)
def test_a_generation_is_the_same(
    cases: Callable[[str], Case],
    tmp_path: Path,
    row_by_row: None,
    filled: list[int],
    name: str,
    tables: list[int],
) -> None:
    """FLUX.1 has pooled text in it, so that each prompt has tables of its own; one for inputs rounded, one for not."""
    case = cases(name)
    pipe = case.load(transformer=MAKERS[name]["modelopt nvfp4"](case, tmp_path / "made"))
    sampling = case.sampling.replace(steps=4)
    expected = generate(
        pipe, PROMPTS, sampling=sampling, check_output=False, bf16_steps=StepSchedule(1, 1)
    ).latents
    assert precompute_modulation(pipe.transformer, pipe.scheduler) > 0
    got = generate(
        pipe, PROMPTS, sampling=sampling, check_output=False, bf16_steps=StepSchedule(1, 1)
    ).latents
    assert torch.equal(got, expected)
    assert filled == tables


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("few", [1, 8])
@settings(max_examples=15, deadline=None)
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from([1, 2, 3]),
            st.sampled_from([0.1, 0.3, 0.35, 1.0]),
            st.sampled_from([1.0, 3.5]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_calls_in_any_order_are_what_they_are_alone(name: str, few: int, calls: list[Any]) -> None:
    """Of any batch, at steps that the scheduler knows and others, with any guidance, and with other text in place."""
    plain = transformer(name)
    ahead = copy.deepcopy(plain)
    precompute_modulation(ahead, SCHEDULE)
    kept = {batch: arguments(name, plain, batch) for batch in (1, 2, 3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modulation, "GEMV_MAX_ROWS", few)
        for batch, step, guidance in calls:
            inputs = kept[batch]
            inputs["t" if "t" in inputs else "timestep"] = torch.full((batch,), step)
            if "guidance" in inputs:
                inputs["guidance"] = torch.full((batch,), guidance)
                inputs["pooled_projections"].mul_(guidance)
            tolerance = {"rtol": 0, "atol": 0} if few == 1 else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(result(ahead, inputs), result(plain, inputs), **tolerance)


@pytest.mark.parametrize("name", TINY)
def test_a_batch_may_have_one_time_step(name: str) -> None:
    plain = transformer(name)
    ahead = copy.deepcopy(plain)
    precompute_modulation(ahead, SCHEDULE)
    inputs = arguments(name, plain, 2)
    alone = {
        argument: inputs[argument][:1]
        for argument in ("t", "timestep", "guidance")
        if argument in inputs
    }
    torch.testing.assert_close(
        result(ahead, inputs | alone), result(plain, inputs | alone), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", TINY)
def test_every_argument_that_modulation_depends_on_is_named(name: str) -> None:
    """Those that are not named may change without the embedding changing, those that are named may not."""
    model = transformer(name)
    precompute_modulation(model, SCHEDULE)
    ahead: Any = model.forward
    inputs = arguments(name, model)

    def embedded(**changed: Any) -> Tensor:
        call = ahead.signature.bind(**inputs | changed)
        out: Tensor = ahead._embed_timesteps(
            call, call.arguments[ahead.embedding.arguments[0]][None]
        )
        return out

    with torch.no_grad():
        for argument, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                same = torch.equal(embedded(**{argument: value + 0.25}), embedded())
                assert same != (argument in ahead.embedding.arguments), argument


def test_what_a_table_is_made_for(filled: list[int]) -> None:
    """A step that is known costs nothing again; states of the layers, guidances and texts have tables of their own."""
    model = transformer("flux1")
    assert precompute_modulation(model, SCHEDULE) == 3
    inputs = arguments("flux1", model) | {"timestep": torch.full((1,), 0.9)}
    for step in (0.9, 0.8, 0.1):
        result(model, inputs | {"timestep": torch.full((1,), step)})
    assert filled == [9]
    result(model, inputs | {"hidden_states": inputs["hidden_states"] + 1})
    result(model, inputs | {"pooled_projections": inputs["pooled_projections"].clone()})
    assert filled == [9]
    with unquantized_activations(model):
        result(model, inputs)
    result(model, inputs | {"guidance": torch.zeros(1)})
    inputs["pooled_projections"].add_(1)
    result(model, inputs)
    assert filled == [9, 9, 9, 9]
    result(model, inputs | {"timestep": torch.full((1,), 0.87)})
    assert filled[4:] == [1], "not one of the scheduler's"
    assert len(model.forward.tables) == MAX_ENTRIES


def test_a_call_is_made_twice_only_if_its_step_is_unexpected(filled: list[int]) -> None:
    scheduler = SimpleNamespace(timesteps=SCHEDULE.timesteps)
    model = transformer("zimage")
    precompute_modulation(model, scheduler)
    ahead: Any = model.forward
    calls: list[float] = []
    function = ahead.wrapped_forward
    ahead.wrapped_forward = lambda *args, **kwargs: (calls.append(1), function(*args, **kwargs))[1]

    def made(step: float) -> int:
        calls.clear()
        result(model, arguments("zimage", model) | {"t": (1000 - torch.tensor([step])) / 1000})
        return len(calls)

    assert [made(step) for step in (1000, 900, 100, 500)] == [1, 1, 1, 1]
    assert [made(step) for step in (950, 850, 850, 750)] == [2, 1, 1, 1], (
        "the scheduler knows none of these"
    )
    assert [made(step) for step in (900, 800)] == [1, 1]
    scheduler.timesteps = torch.tensor([800.0, 700.0])
    assert [made(step) for step in (800, 700)] == [1, 1]
    assert filled == [10, 1, 1, 1], (
        "those of the schedule are still known, and so are the new one's"
    )
    scheduler.timesteps = torch.tensor([800.0, 650.0])
    assert [made(step) for step in (800, 650)] == [1, 1]
    assert filled[4:] == [2]


def test_a_table_is_no_longer_than_it_may_be(filled: list[int]) -> None:
    model = transformer("zimage")
    precompute_modulation(model, SimpleNamespace(timesteps=torch.arange(1000.0, 0, -1)))
    for step in (0.0, 0.063, 0.064):
        result(
            model,
            arguments("zimage", model) | {"t": (1000 - torch.tensor([1000 - step * 1000])) / 1000},
        )
    assert filled == [MAX_STEPS, MAX_STEPS]


def test_a_model_that_was_moved_works_out_its_modulation_anew(row_by_row: None) -> None:
    plain = transformer("qwenimage")
    ahead = copy.deepcopy(plain)
    precompute_modulation(ahead, SCHEDULE)
    inputs = arguments("qwenimage", plain)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        plain, ahead = plain.to(dtype), ahead.to(dtype)
        own = {key: x.to(dtype) if isinstance(x, Tensor) else x for key, x in inputs.items()}
        assert torch.equal(result(ahead, own), result(plain, own))


@pytest.mark.parametrize("name", TINY)
def test_other_weights_are_worked_out_anew(name: str) -> None:
    plain = transformer(name)
    ahead = copy.deepcopy(plain)
    cache_text_refiner(ahead)
    precompute_modulation(ahead, SCHEDULE)
    inputs = arguments(name, plain)
    for _ in range(2):
        torch.testing.assert_close(
            result(ahead, inputs), result(plain, inputs), rtol=1e-4, atol=1e-4
        )
        for mine, its in zip(ahead.parameters(), plain.parameters(), strict=True):
            its.data = torch.randn_like(its) * 0.1 + (its.ndim == 1)
            mine.data = its.data.clone()


def test_text_that_reads_the_first_half_of_two_embeddings() -> None:
    """Qwen-Image-Edit 2511: an image that is edited has an embedding of its own, at time step 0."""
    torch.manual_seed(0)
    plain = type(tiny.qwenimage().transformer)(
        **dict(tiny.qwenimage().transformer.config) | {"zero_cond_t": True, "num_layers": 2}
    ).eval()
    ahead = copy.deepcopy(plain)
    assert precompute_modulation(ahead, SCHEDULE) == 4
    for batch in (1, 2):
        inputs = arguments("qwenimage", plain, batch)
        inputs["img_shapes"] = [[(1, 2, 4), (1, 2, 4)]] * batch
        torch.testing.assert_close(
            result(ahead, inputs), result(plain, inputs), rtol=1e-4, atol=1e-5
        )


def test_blocks_that_read_two_embeddings_are_left_alone() -> None:
    model = transformer("zimage")
    model.register_to_config(siglip_feat_dim=16)
    assert precompute_modulation(model, SCHEDULE) == 0
    assert not isinstance(model.forward, PrecomputedModulation)


def test_families_whose_modulation_is_not_described_are_left_alone() -> None:
    assert precompute_modulation(tiny.flux2().transformer, SCHEDULE) == 0


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_a_steps_numbers_do_not_depend_on_how_many_are_known(rows: int) -> None:
    layer = QuantLinear(fp8_tensor(48, 64), torch.float32)
    x = torch.randn(11, rows, 64)
    whole = run_in_chunks(layer, x)
    assert whole.shape == (11, rows, 48)
    torch.testing.assert_close(whole, layer(x))
    for step in (0, 7, 10):
        assert torch.equal(run_in_chunks(layer, x[step : step + 1])[0], whole[step])


@pytest.mark.parametrize("name", TINY)
def test_a_block_is_compiled_once_however_many_there_are(name: str) -> None:
    """Each has its own rows in the one buffer, and none is compiled anew for that."""
    assert compiles(name, 3, ahead=True) == compiles(name, 3, ahead=False)
    assert compiles(name, 5, ahead=True) == compiles(name, 3, ahead=True) > 0


def test_a_precomputed_layer_still_owns_its_weights() -> None:
    model = transformer("flux1")
    before = {name.replace(".layer", ""): p.shape for name, p in model.named_parameters()}
    layers = precompute_modulation(model, SCHEDULE)
    assert {name.replace(".layer", ""): p.shape for name, p in model.named_parameters()} == before
    assert sum(isinstance(module, PrecomputedLinear) for module in model.modules()) == layers
    with pytest.raises(Exception, match="sped up already"):
        speed_up(model)


def test_a_condition_is_read_again_only_if_it_is_another_tensor_or_was_changed() -> None:
    read: list[Tensor] = []
    remembered = TensorCache()

    def values(tensor: Tensor) -> tuple[float, ...]:
        found: tuple[float, ...] = remembered.get_or_compute(
            [tensor], None, lambda: (read.append(tensor), tuple(tensor.tolist()))[1]
        )
        return found

    first = torch.ones(3)
    assert values(first) == values(first) == (1, 1, 1)
    assert len(read) == 1
    first.mul_(2)
    assert values(first) == (2, 2, 2)
    other = torch.zeros(1)
    for _ in range(3):  # as guidance against another prompt has it
        assert (values(other), values(first)) == ((0,), (2, 2, 2))
    assert len(read) == 3
    assert values(torch.ones(1)) == (1,), "a new tensor, where the last one may have been"
    with torch.inference_mode():
        unwatched = torch.ones(2)
        assert values(unwatched) == (1, 1)
        assert values(unwatched.mul_(3)) == (3, 3)


def test_calls_in_and_out_of_inference_mode_write_to_the_same_rows() -> None:
    model = transformer("flux1")
    plain = copy.deepcopy(model)
    precompute_modulation(model, SCHEDULE)
    inputs = arguments("flux1", plain)
    with torch.inference_mode():
        result(model, inputs)
    for step in (0.9, 0.5):
        inputs["timestep"] = torch.full((1,), step)
        torch.testing.assert_close(
            result(model, inputs), result(plain, inputs), rtol=1e-4, atol=1e-4
        )
