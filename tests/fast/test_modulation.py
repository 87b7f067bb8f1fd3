"""Precomputed modulation gives, at every step, the same numbers as the blocks' own layers."""

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
from support.modulation_models import (
    GRAPHS,
    SCHEDULE,
    TINY,
    arguments,
    count_graphs,
    result,
    transformer,
)
from support.pipeline_cases import PROMPTS, Case
from support.quant_tensors import fp8_tensor


@pytest.fixture
def row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run GEMMs for one step at a time: on a CPU, eight rows are summed in another order."""
    monkeypatch.setattr(modulation, "GEMV_MAX_ROWS", 1)


@pytest.fixture
def table_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of steps of every computed table."""
    calls_for: list[int] = []
    rows = PrecomputedModulation._compute_outputs

    def counted(self: PrecomputedModulation, call: Any, steps: Tensor) -> Tensor:
        calls_for.append(len(steps))
        return rows(self, call, steps)

    monkeypatch.setattr(PrecomputedModulation, "_compute_outputs", counted)
    return calls_for


@pytest.mark.parametrize(
    ("name", "tables"), [("flux1", [4, 3] * 2), ("zimage", [4, 3]), ("qwenimage", [4, 3])]
)
def test_generation_is_unchanged(
    cases: Callable[[str], Case],
    tmp_path: Path,
    row_by_row: None,
    table_steps: list[int],
    name: str,
    tables: list[int],
) -> None:
    """FLUX.1's modulation depends on pooled text, so each prompt has tables of its own.

    There is one table with quantized activations and one without.
    """
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
    assert table_steps == tables


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("max_rows", [1, 8])
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
def test_calls_in_any_order_equal_the_plain_model(
    name: str, max_rows: int, calls: list[Any]
) -> None:
    """Batch, step, guidance and text vary; steps may be unknown to the scheduler."""
    plain = transformer(name)
    precomputed = copy.deepcopy(plain)
    precompute_modulation(precomputed, SCHEDULE)
    inputs_of = {batch: arguments(name, plain, batch) for batch in (1, 2, 3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modulation, "GEMV_MAX_ROWS", max_rows)
        for batch, step, guidance in calls:
            inputs = inputs_of[batch]
            inputs["t" if "t" in inputs else "timestep"] = torch.full((batch,), step)
            if "guidance" in inputs:
                inputs["guidance"] = torch.full((batch,), guidance)
                inputs["pooled_projections"].mul_(guidance)
            tolerance = {"rtol": 0, "atol": 0} if max_rows == 1 else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(
                result(precomputed, inputs), result(plain, inputs), **tolerance
            )


@pytest.mark.parametrize("name", TINY)
def test_batch_may_share_one_time_step(name: str) -> None:
    plain = transformer(name)
    precomputed = copy.deepcopy(plain)
    precompute_modulation(precomputed, SCHEDULE)
    inputs = arguments(name, plain, 2)
    alone = {
        argument: inputs[argument][:1]
        for argument in ("t", "timestep", "guidance")
        if argument in inputs
    }
    torch.testing.assert_close(
        result(precomputed, inputs | alone), result(plain, inputs | alone), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", TINY)
def test_embedding_depends_on_the_named_arguments_only(name: str) -> None:
    """Changing an argument changes the embedding exactly if the family names it."""
    model = transformer(name)
    precompute_modulation(model, SCHEDULE)
    precomputed: Any = model.forward
    inputs = arguments(name, model)

    def embedded(**changed: Any) -> Tensor:
        call = precomputed.signature.bind(**inputs | changed)
        out: Tensor = precomputed._embed_timesteps(
            call, call.arguments[precomputed.embedding.arguments[0]][None]
        )
        return out

    with torch.no_grad():
        for argument, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                same = torch.equal(embedded(**{argument: value + 0.25}), embedded())
                assert same != (argument in precomputed.embedding.arguments), argument


def test_when_a_modulation_table_is_computed(table_steps: list[int]) -> None:
    """Known steps are not recomputed. Modes, guidances and texts have tables of their own."""
    model = transformer("flux1")
    assert precompute_modulation(model, SCHEDULE) == 3
    inputs = arguments("flux1", model) | {"timestep": torch.full((1,), 0.9)}
    for step in (0.9, 0.8, 0.1):
        result(model, inputs | {"timestep": torch.full((1,), step)})
    assert table_steps == [9]
    result(model, inputs | {"hidden_states": inputs["hidden_states"] + 1})
    result(model, inputs | {"pooled_projections": inputs["pooled_projections"].clone()})
    assert table_steps == [9]
    with unquantized_activations(model):
        result(model, inputs)
    result(model, inputs | {"guidance": torch.zeros(1)})
    inputs["pooled_projections"].add_(1)
    result(model, inputs)
    assert table_steps == [9, 9, 9, 9]
    result(model, inputs | {"timestep": torch.full((1,), 0.87)})
    assert table_steps[4:] == [1], "a step that is not the scheduler's"
    assert len(model.forward.tables) == MAX_ENTRIES


def test_call_is_repeated_only_for_an_unknown_step(table_steps: list[int]) -> None:
    scheduler = SimpleNamespace(timesteps=SCHEDULE.timesteps)
    model = transformer("zimage")
    precompute_modulation(model, scheduler)
    precomputed: Any = model.forward
    calls: list[float] = []
    function = precomputed.wrapped_forward
    precomputed.wrapped_forward = lambda *args, **kwargs: (
        calls.append(1),
        function(*args, **kwargs),
    )[1]

    def calls_for(step: float) -> int:
        calls.clear()
        result(model, arguments("zimage", model) | {"t": (1000 - torch.tensor([step])) / 1000})
        return len(calls)

    assert [calls_for(step) for step in (1000, 900, 100, 500)] == [1, 1, 1, 1]
    assert [calls_for(step) for step in (950, 850, 850, 750)] == [2, 1, 1, 1], (
        "the scheduler knows none of these"
    )
    assert [calls_for(step) for step in (900, 800)] == [1, 1]
    scheduler.timesteps = torch.tensor([800.0, 700.0])
    assert [calls_for(step) for step in (800, 700)] == [1, 1]
    assert table_steps == [10, 1, 1, 1], "steps of both schedules are known"
    scheduler.timesteps = torch.tensor([800.0, 650.0])
    assert [calls_for(step) for step in (800, 650)] == [1, 1]
    assert table_steps[4:] == [2]


def test_table_length_is_limited(table_steps: list[int]) -> None:
    model = transformer("zimage")
    precompute_modulation(model, SimpleNamespace(timesteps=torch.arange(1000.0, 0, -1)))
    for step in (0.0, 0.063, 0.064):
        result(
            model,
            arguments("zimage", model) | {"t": (1000 - torch.tensor([1000 - step * 1000])) / 1000},
        )
    assert table_steps == [MAX_STEPS, MAX_STEPS]


def test_cast_model_recomputes_its_modulation(row_by_row: None) -> None:
    plain = transformer("qwenimage")
    precomputed = copy.deepcopy(plain)
    precompute_modulation(precomputed, SCHEDULE)
    inputs = arguments("qwenimage", plain)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        plain, precomputed = plain.to(dtype), precomputed.to(dtype)
        cast_inputs = {
            key: x.to(dtype) if isinstance(x, Tensor) else x for key, x in inputs.items()
        }
        assert torch.equal(result(precomputed, cast_inputs), result(plain, cast_inputs))


@pytest.mark.parametrize("name", TINY)
def test_replaced_weights_recompute_modulation(name: str) -> None:
    plain = transformer(name)
    precomputed = copy.deepcopy(plain)
    cache_text_refiner(precomputed)
    precompute_modulation(precomputed, SCHEDULE)
    inputs = arguments(name, plain)
    for _ in range(2):
        torch.testing.assert_close(
            result(precomputed, inputs), result(plain, inputs), rtol=1e-4, atol=1e-4
        )
        for parameter, plain_parameter in zip(
            precomputed.parameters(), plain.parameters(), strict=True
        ):
            plain_parameter.data = torch.randn_like(plain_parameter) * 0.1 + (
                plain_parameter.ndim == 1
            )
            parameter.data = plain_parameter.data.clone()


def test_text_reads_the_first_half_of_two_embeddings() -> None:
    """In Qwen-Image-Edit 2511 a source image has an embedding of its own, at time step 0."""
    torch.manual_seed(0)
    plain = type(tiny.qwenimage().transformer)(
        **dict(tiny.qwenimage().transformer.config) | {"zero_cond_t": True, "num_layers": 2}
    ).eval()
    precomputed = copy.deepcopy(plain)
    assert precompute_modulation(precomputed, SCHEDULE) == 4
    for batch in (1, 2):
        inputs = arguments("qwenimage", plain, batch)
        inputs["img_shapes"] = [[(1, 2, 4), (1, 2, 4)]] * batch
        torch.testing.assert_close(
            result(precomputed, inputs), result(plain, inputs), rtol=1e-4, atol=1e-5
        )


def test_model_with_two_embeddings_is_unsupported() -> None:
    model = transformer("zimage")
    model.register_to_config(siglip_feat_dim=16)
    assert precompute_modulation(model, SCHEDULE) == 0
    assert not isinstance(model.forward, PrecomputedModulation)


def test_family_without_time_embedding_is_unsupported() -> None:
    assert precompute_modulation(tiny.flux2().transformer, SCHEDULE) == 0


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_output_of_a_step_does_not_depend_on_the_number_of_steps(rows: int) -> None:
    layer = QuantLinear(fp8_tensor(48, 64), torch.float32)
    x = torch.randn(11, rows, 64)
    whole = run_in_chunks(layer, x)
    assert whole.shape == (11, rows, 48)
    torch.testing.assert_close(whole, layer(x))
    for step in (0, 7, 10):
        assert torch.equal(run_in_chunks(layer, x[step : step + 1])[0], whole[step])


@pytest.mark.parametrize("name", TINY)
def test_number_of_graphs_does_not_depend_on_the_number_of_blocks(name: str) -> None:
    """Each block reads its own rows of one buffer, which needs no graph of its own."""
    assert count_graphs(name, 5, precompute=True) == GRAPHS[name]


def test_precomputed_layer_keeps_its_weights() -> None:
    model = transformer("flux1")
    before = {name.replace(".layer", ""): p.shape for name, p in model.named_parameters()}
    layers = precompute_modulation(model, SCHEDULE)
    assert {name.replace(".layer", ""): p.shape for name, p in model.named_parameters()} == before
    assert sum(isinstance(module, PrecomputedLinear) for module in model.modules()) == layers
    with pytest.raises(Exception, match="sped up already"):
        speed_up(model)


def test_tensor_cache_recomputes_for_new_or_changed_tensors() -> None:
    read: list[Tensor] = []
    cache = TensorCache()

    def values(tensor: Tensor) -> tuple[float, ...]:
        found: tuple[float, ...] = cache.get_or_compute(
            [tensor], None, lambda: (read.append(tensor), tuple(tensor.tolist()))[1]
        )
        return found

    first = torch.ones(3)
    assert values(first) == values(first) == (1, 1, 1)
    assert len(read) == 1
    first.mul_(2)
    assert values(first) == (2, 2, 2)
    other = torch.zeros(1)
    for _ in range(3):  # as with a negative prompt
        assert (values(other), values(first)) == ((0,), (2, 2, 2))
    assert len(read) == 3
    assert values(torch.ones(1)) == (1,), "a new tensor, perhaps at the same address"
    with torch.inference_mode():
        inference_tensor = torch.ones(2)
        assert values(inference_tensor) == (1, 1)
        assert values(inference_tensor.mul_(3)) == (3, 3)


def test_calls_in_and_out_of_inference_mode_share_a_buffer() -> None:
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
