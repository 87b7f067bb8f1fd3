"""The dequantization kernels on a GPU, bit for bit: `pytest -m gpu FILE`."""

from dataclasses import replace

import pytest
import torch

from mezzotint.kernels.backends.dequantize import BACKEND
from mezzotint.kernels.dequantize import dequantize
from mezzotint.nn import QuantLinear
from mezzotint.tensor import QuantTensor
from support.errors_of import relative_error
from support.packed_weights import (
    LAYERS,
    described,
    expected,
    packed_weights,
    random_weight,
    same_numbers,
)

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def on_gpu(weight: QuantTensor) -> QuantTensor:
    moved = weight.to(GPU)
    return replace(moved, prepared=BACKEND.prepare(moved))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 96])
def test_dequantized_weights_are_those_of_the_cpu(rows: int, dtype: torch.dtype) -> None:
    for weight in packed_weights(rows, 768, rows):
        got = dequantize(on_gpu(weight), dtype).cpu()
        assert same_numbers(got, expected(weight, dtype)), described(weight)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 77])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_multiplies_by_the_decoded_weight(name: str, rows: int, compiled: bool) -> None:
    """5e-3: weights and output are rounded to BF16, and sums are in another order."""
    torch.manual_seed(0)
    torch.compiler.reset()
    weight = random_weight(name, GPU)
    layer = QuantLinear(weight, backend_name="dequantize")
    x = torch.randn(rows, weight.shape[1], device=GPU).bfloat16()
    y = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
    exact = x.float() @ weight.scheme.decode(weight.parts).t()
    assert relative_error(y.float(), exact) <= 5e-3


def test_a_recorded_layer_replays_its_dequantization() -> None:
    weight = random_weight("gguf_q4_k", GPU)
    layer = QuantLinear(weight, backend_name="dequantize")
    x = torch.randn(8, weight.shape[1], device=GPU).bfloat16()
    once = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(2):
        y.zero_()
        graph.replay()
        assert torch.equal(y, once)
