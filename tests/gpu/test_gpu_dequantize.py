"""The dequantization kernels on a GPU, bit for bit: `pytest -m gpu FILE`."""

from dataclasses import replace

import pytest
import torch

from mezzotint.kernels.backends.dequantize import BACKEND
from mezzotint.kernels.dequantize import dequantize
from mezzotint.nn import QuantLinear
from mezzotint.tensor import QuantTensor
from support.errors_of import relative_error
from support.packed_weights import described, packed_weights, same_numbers

pytestmark = pytest.mark.gpu


def on_gpu(weight: QuantTensor) -> QuantTensor:
    moved = weight.to(torch.device("cuda"))
    return replace(moved, prepared=BACKEND.prepare(moved))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 96])
def test_dequantized_weights_are_those_of_the_cpu(rows: int, dtype: torch.dtype) -> None:
    for weight in packed_weights(rows, 768, rows):
        got = dequantize(on_gpu(weight), dtype).cpu()
        assert same_numbers(got, weight.scheme.decode(weight.parts).to(dtype)), described(weight)


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_on_dequantize_agree_with_reference(compiled: bool) -> None:
    """5e-3: weights and output are rounded to BF16, and sums are in another order."""
    x = torch.randn(77, 768, device="cuda").bfloat16()
    for weight in packed_weights(96, 768):
        finite = bool(weight.scheme.decode(weight.parts).abs().amax() < 1e4)
        if not finite:
            continue
        torch.compiler.reset()
        layer = QuantLinear(on_gpu(replace(weight, prepared={})), backend_name="dequantize")
        y = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
        exact = x.float() @ weight.scheme.decode(weight.parts).cuda().t()
        assert relative_error(y.float(), exact) <= 5e-3, described(weight)
