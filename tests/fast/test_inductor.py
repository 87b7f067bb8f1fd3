"""Our overrides of Inductor's choices; tests/gpu/test_gpu.py compiles blocks with them."""

from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch._inductor.runtime.hints import ReductionHint
from torch.fx.experimental.proxy_tensor import make_fx

from mezzotint.fast.activations import tanh_by_sigmoid
from mezzotint.fast.inductor import DECOMPOSITIONS, MAX_PERSISTENT_ROW, PersistentRowChoices
from mezzotint.schemes.minifloats import round_e4m3

FUNCTIONS = {
    "gelu": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "clamp": lambda x: round_e4m3(x).float(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_decompositions_compute_the_same_function(name: str) -> None:
    x = torch.cat(
        (
            torch.linspace(-20, 20, 999),
            torch.tensor([448.0, 449, -1e9, torch.inf, -torch.inf, torch.nan]),
        )
    )
    traced = make_fx(FUNCTIONS[name], decomposition_table=DECOMPOSITIONS)(x)
    assert name not in traced.code
    expected = FUNCTIONS[name](x)
    finite = (
        x.abs() < torch.inf if name == "gelu" else torch.ones_like(x, dtype=torch.bool)
    )  # -inf * 0
    tolerance = {"rtol": 0, "atol": 0} if name == "clamp" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(traced(x)[finite], expected[finite], equal_nan=True, **tolerance)


def test_other_forms_of_clamp_and_gelu_are_unchanged() -> None:
    traced = make_fx(
        lambda x: nn.functional.gelu(x.clamp(min=0)), decomposition_table=DECOMPOSITIONS
    )(torch.randn(3))
    assert "clamp" in traced.code
    assert "gelu" in traced.code


def test_tanh_by_sigmoid_is_within_2e_7() -> None:
    x = torch.linspace(-10, 10, 100_001)
    assert float((tanh_by_sigmoid(x) - x.double().tanh()).abs().max()) < 2e-7


@pytest.mark.parametrize(
    ("row", "hint", "persistent"),
    [
        (sympy.Integer(3840), ReductionHint.INNER, True),
        (sympy.Integer(MAX_PERSISTENT_ROW), ReductionHint.INNER, True),
        (sympy.Integer(MAX_PERSISTENT_ROW + 1), ReductionHint.INNER, False),
        (sympy.Integer(3840), ReductionHint.OUTER_TINY, False),
        (sympy.Symbol("s0"), ReductionHint.INNER, False),
    ],
)
def test_rows_stay_in_registers_up_to_a_length(
    monkeypatch: pytest.MonkeyPatch, row: Any, hint: ReductionHint, persistent: bool
) -> None:
    inductors_calls = []
    monkeypatch.setattr(
        "torch._inductor.choices.InductorChoices.should_use_persistent_reduction",
        staticmethod(lambda *given: inductors_calls.append(given)),
    )
    features = SimpleNamespace(reduction_numel=row, get_reduction_hint=lambda: hint)
    assert bool(PersistentRowChoices.should_use_persistent_reduction(features, False)) is persistent
    assert len(inductors_calls) == (not persistent), "Inductor decides for all other rows"
