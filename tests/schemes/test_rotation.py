"""Hadamard rotations: the matrices of the real tools, and layers that apply them."""

import pytest
import torch
from comfy_kitchen.tensor.int8_utils import _build_hadamard
from scipy.linalg import hadamard
from torch.nn import functional as F

from mezzotint.errors import ShapeMismatch, Unsupported
from mezzotint.kernels.backends.weight_only import BACKEND as WEIGHT_ONLY
from mezzotint.schemes import INT8
from mezzotint.schemes.rotation import regular_hadamard, rotate, sylvester_hadamard
from mezzotint.tensor import PLAIN, QuantTensor


@pytest.mark.parametrize("size", [4, 16, 64, 256, 1024])
def test_the_regular_matrix_is_comfy_kitchens(size: int) -> None:
    assert torch.equal(regular_hadamard(size) / size**0.5, _build_hadamard(size))


@pytest.mark.parametrize("size", [2, 8, 128, 4096])
def test_the_sylvester_matrix_is_scipys(size: int) -> None:
    assert torch.equal(sylvester_hadamard(size), torch.from_numpy(hadamard(size)).to(torch.int8))


@pytest.mark.parametrize(("matrix", "size"), [(regular_hadamard, 8), (sylvester_hadamard, 12)])
def test_other_sizes_are_unsupported(matrix: object, size: int) -> None:
    with pytest.raises(Unsupported, match=str(size)):
        matrix(size)  # type: ignore[operator]


def rotated_layer() -> tuple[torch.Tensor, QuantTensor]:
    """Return weights [24, 64], and their INT8 copy whose columns are rotated in groups of 16."""
    weights = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    signs = regular_hadamard(16)
    rotated = rotate(weights, signs)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    codes = (rotated / scale).round().to(torch.int8)
    parts = {"codes": codes, "weight_scale": scale, "rotation": signs}
    return weights, QuantTensor(INT8, PLAIN, (24, 64), parts, dynamic_input=True)


def test_a_rotated_layer_multiplies_its_own_input() -> None:
    weights, layer = rotated_layer()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert (INT8.dequantize(layer.parts) - weights).norm() / weights.norm() < 0.01
    expected = F.linear(x, INT8.dequantize(layer.parts))
    exact = INT8.linear(x, layer.parts, quantize=False)
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(WEIGHT_ONLY.linear(x, layer, None, "bf16"), exact)
    quantized = INT8.linear(x, layer.parts, quantize=True)
    assert 0 < (quantized - exact).norm() / exact.norm() < 0.02


def test_a_cut_layer_keeps_whole_groups() -> None:
    weights, layer = rotated_layer()
    cut = layer.first_columns(32)
    assert (INT8.dequantize(cut.parts) - weights[:, :32]).norm() / weights.norm() < 0.01
    with pytest.raises(ShapeMismatch, match="multiple of 16"):
        layer.first_columns(24)
