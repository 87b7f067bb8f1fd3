"""Products that leave the input alone (W4A16, W8A16), on a CUDA device: `pytest -m gpu -s` this file."""

import pytest
import torch

import four_bits
from mezzotint.kernels import BF16
from mezzotint.kernels.humming import LIBRARY
from mezzotint.nn import QuantLinear, use_backend
from mezzotint.schemes import FP8
from mezzotint.schemes.fp8 import encode_fp8
from mezzotint.tensor import PLAIN, QuantTensor
from test_backends import joined

pytestmark = pytest.mark.gpu
SHAPES = [(3072, 3072), (12288, 3072), (3072, 15360)]


def forms(out: int, in_: int) -> dict[str, QuantTensor]:
    fp8 = QuantTensor(FP8, PLAIN, (out, in_), encode_fp8(four_bits.random(out, in_, seed=0)))
    return four_bits.all_of(out, in_) | {"nvfp4, joined": joined(out, in_), "fp8": fp8}


def against_reference(layer: QuantLinear, rows: int, compiled: bool) -> float:
    """The relative error of a layer on inputs with columns of outliers, compiled or not."""
    x = torch.randn(rows, layer.in_features, device="cuda")
    x[:, ::512] *= 20
    x = x.bfloat16()
    y = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
    with use_backend("reference"):
        expected = layer(x).float()
    error = float(torch.linalg.norm(y.float() - expected) / torch.linalg.norm(expected))
    backend = layer.selection.backend.name
    print(f"{backend} {layer.scheme.name} {layer.weight.shape}, {rows} rows, compiled={compiled}: {error:.2e}")
    return error


@pytest.mark.skipif(LIBRARY.missing() is not None, reason=str(LIBRARY.missing()))
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 77, 4608])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["nvfp4, static", "nvfp4_svd", "nvfp4, joined"])
def test_humming_agrees_with_reference(name: str, shape: tuple[int, int], rows: int, compiled: bool) -> None:
    """5e-3: weights and output are rounded to BF16, 1.7e-3 each, and sums are in another order."""
    layer = QuantLinear(forms(*shape)[name], activations=BF16).to("cuda")
    assert layer.selection.backend.name == "humming"
    assert against_reference(layer, rows, compiled) <= 5e-3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", forms(16, 64))
def test_decoding_before_each_product_agrees_with_reference(name: str, compiled: bool) -> None:
    """5e-3: as above."""
    weight = forms(3072, 3072)[name].to(torch.device("cuda"))
    layer = QuantLinear(weight, activations=BF16, only="weight_only")
    assert against_reference(layer, 4608, compiled) <= 5e-3
