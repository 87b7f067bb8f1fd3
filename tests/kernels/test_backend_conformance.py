"""What every backend must do, checked on the reference and on a backend from a plugin."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mezzotint.kernels import (
    QUANTIZED_ACTIVATIONS,
    Backend,
    Can,
    Cannot,
    Target,
    WeightSpec,
    all_backends,
    get_backend,
    select,
    takes,
)
from mezzotint.nn import QuantLinear
from mezzotint.schemes import schemes
from mezzotint.tensor import Layout
from support.plugin_packages import install_plugin
from support.quant_tensors import fp8_tensor, nvfp4_tensor, with_bias

STUB = """
from mezzotint.kernels import Can
from mezzotint.schemes import FP8
from mezzotint.tensor import PLAIN


class Stub:
    name = "stub"
    priority = 99
    weight_layout = PLAIN
    schemes = (FP8,)

    def can(self, weight, target, activations):
        return Can()

    def prepare(self, weight):
        return {"matrix": weight.scheme.dequantize(weight.parts)}

    def linear(self, x, weight, bias, activations):
        y = x.float() @ weight.prepared["matrix"].t()
        return (y if bias is None else y + bias.float()).to(x.dtype)


BACKEND = Stub()
"""
TENSORS = {"fp8": fp8_tensor(), "nvfp4": nvfp4_tensor()}
TARGETS = (Target("cpu"), Target("cuda", (9, 0)), Target("cuda", (10, 0)), Target("rocm"))


@pytest.fixture
def _stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install_plugin(tmp_path, monkeypatch, "mezzotint.backends", "plugin_stub:BACKEND", STUB)
    all_backends.cache_clear()
    yield
    monkeypatch.undo()
    all_backends.cache_clear()


def check_declaration(backend: Backend) -> None:
    """A backend has a name, a priority and a layout, and declines with a reason."""
    assert backend.name.isidentifier()
    assert isinstance(backend.priority, int)
    assert isinstance(backend.weight_layout, Layout)
    assert any(takes(backend, scheme) for scheme in schemes().values())
    for tensor in TENSORS.values():
        for target in TARGETS:
            answer = backend.can(WeightSpec.of(tensor), target, QUANTIZED_ACTIVATIONS)
            assert isinstance(answer, Can) or (isinstance(answer, Cannot) and answer.reason)


def check_linear(name: str, scheme: str) -> None:
    """A layer keeps dtype and leading axes, adds its bias, and multiplies by the weight."""
    tensor = with_bias(TENSORS[scheme], torch.randn(48))
    layer = QuantLinear(tensor, torch.float32, backend_name=name)
    x = torch.randn(2, 5, 64).clamp(-3, 3)
    y = layer(x)
    assert (y.shape, y.dtype) == ((2, 5, 48), x.dtype)
    exact = x @ tensor.scheme.dequantize(tensor.parts).t() + tensor.parts["bias"]
    assert torch.linalg.norm(y - exact) < 0.2 * torch.linalg.norm(exact)


@pytest.mark.parametrize("name", sorted(all_backends()))
def test_backend_conforms(name: str) -> None:
    check_declaration(get_backend(name))


@pytest.mark.parametrize("scheme", TENSORS)
def test_reference_conforms(scheme: str) -> None:
    check_linear("reference", scheme)


@pytest.mark.usefixtures("_stub")
def test_backend_of_a_plugin_is_found_selected_and_conforms() -> None:
    assert select(WeightSpec.of(TENSORS["fp8"]), Target("cpu")).backend.name == "stub"
    assert select(WeightSpec.of(TENSORS["nvfp4"]), Target("cpu")).backend.name == "reference"
    check_declaration(get_backend("stub"))
    check_linear("stub", "fp8")
