"""`layer.weight` of a quantized layer can be read, but not written to."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import BadRequest
from mezzotint.kernels import BF16_ACTIVATIONS
from mezzotint.layouts import convert
from mezzotint.nn import DecodedWeight, FusedLinear, FusedLinearSlice, QuantLinear, SplitLinear
from mezzotint.tensor import Layout
from support.quant_tensors import fp8_tensor, nvfp4_tensor

LAYERS: dict[str, Callable[[], Any]] = {
    "fp8": lambda: QuantLinear(fp8_tensor(), torch.float32),
    "nvfp4": lambda: QuantLinear(nvfp4_tensor()),
    "in tiles": lambda: QuantLinear(convert(nvfp4_tensor(), Layout("high_first", "tiles_128x4"))),
    "in pieces": lambda: SplitLinear([fp8_tensor(), nvfp4_tensor()]),
    "of a group": lambda: FusedLinearSlice(FusedLinear(QuantLinear(fp8_tensor()), [20, 28]), 1),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param]()


def values(layer: Any) -> Tensor:
    decoded: Tensor = layer.dequantize().to(layer.weight.dtype)
    return decoded


def test_metadata_is_that_of_a_linear_and_decodes_nothing(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(layer), "dequantize", lambda _layer: pytest.fail("decoded"))
    weight = layer.weight
    assert tuple(weight.shape) == (layer.out_features, layer.in_features)
    assert (weight.dtype, weight.device) == (layer._dtype_and_device()[0], torch.device("cpu"))
    assert (weight.ndim, weight.numel()) == (2, layer.out_features * layer.in_features)
    assert weight.data.device == weight.detach().device == weight.device
    assert "DecodedWeight" in repr(weight)


def test_values_are_the_decoded_weight(layer: Any) -> None:
    expected = values(layer)
    x = torch.randn(3, layer.in_features, dtype=expected.dtype)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(F.linear(x, layer.weight), F.linear(x, expected))
    assert torch.equal(layer.weight.T[2:5], expected.T[2:5])
    assert torch.equal(
        torch.cat([layer.weight.data, layer.weight]), torch.cat([expected, expected])
    )
    assert layer.weight.float().tolist() == expected.float().tolist()
    with torch.inference_mode():
        assert torch.equal(layer.weight.flatten(), expected.flatten())


def test_a_product_with_the_weight_is_that_of_the_layer() -> None:
    layer = QuantLinear(fp8_tensor(), torch.float32, activations=BF16_ACTIVATIONS)
    x = torch.randn(3, 64)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))


def test_copies_are_ordinary_tensors(layer: Any) -> None:
    file = io.BytesIO()
    torch.save(layer.weight, file)
    file.seek(0)
    for copied in (
        layer.weight.clone(),
        copy.deepcopy(layer.weight),
        layer.weight + 0,
        torch.load(file),
    ):
        assert type(copied) is Tensor
        assert torch.equal(copied, values(layer))
        copied.zero_()
    assert layer.weight.abs().sum() > 0


def add_to_data(layer: Any) -> None:
    layer.weight.data += 1


def add_to_it(layer: Any) -> None:
    layer.weight += 1


def give_it_data(layer: Any) -> None:
    layer.weight.data = torch.zeros(1)


def assign_a_tensor(layer: Any) -> None:
    layer.weight = torch.zeros(1)


def assign_a_parameter(layer: Any) -> None:
    layer.weight = nn.Parameter(torch.zeros(1))


def assign_a_row(layer: Any) -> None:
    layer.weight[0] = 1


def assign_by_a_mask(layer: Any) -> None:
    layer.weight[values(layer) > 0] = 1


WRITES: dict[str, Callable[[Any], Any]] = {
    write.__name__: write
    for write in (
        add_to_data,
        add_to_it,
        give_it_data,
        assign_a_tensor,
        assign_a_parameter,
        assign_a_row,
        assign_by_a_mask,
    )
} | {
    "add_": lambda layer: layer.weight.add_(1),
    "add_ to data": lambda layer: layer.weight.data.add_(torch.ones(1), alpha=0.5),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(1)),
    "a view": lambda layer: layer.weight.view(-1).zero_(),
    "a transposed view": lambda layer: layer.weight.data.T.mul_(2),
    "a slice of a view": lambda layer: layer.weight.t()[1:, ::2].fill_(1),
    "a chunk": lambda layer: layer.weight.chunk(2)[1].zero_(),
    "one of its rows": lambda layer: next(iter(layer.weight)).zero_(),
    "itself, contiguous": lambda layer: layer.weight.contiguous().zero_(),
    "itself, cast to its dtype": lambda layer: layer.weight.to(layer.weight.dtype).zero_(),
    "out": lambda layer: torch.add(layer.weight, 1, out=layer.weight),
    "a list of tensors": lambda layer: torch._foreach_add_([layer.weight], 1),
    "initialized": lambda layer: nn.init.zeros_(layer.weight),
    "a parameter of it": lambda layer: nn.Parameter(layer.weight).data.zero_(),
    "its memory": lambda layer: layer.weight.untyped_storage().fill_(0),
    "its address": lambda layer: layer.weight.data_ptr(),
    "a state dict": lambda layer: layer.load_state_dict({"weight": torch.zeros(1)}, strict=False),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "in inference mode"])
@pytest.mark.parametrize("write", WRITES)
def test_writing_is_an_error_that_says_what_to_do(layer: Any, write: str, inference: bool) -> None:
    before = values(layer)
    with (
        pytest.raises(BadRequest, match="cannot be written to") as raised,
        torch.inference_mode(inference),
    ):
        WRITES[write](layer)
    assert "dequantize()" in raised.value.hint
    assert torch.equal(values(layer), before)


def test_an_array_of_it_cannot_be_written_to() -> None:
    layer = LAYERS["fp8"]()
    array = np.asarray(layer.weight)
    assert np.array_equal(array, layer.dequantize().numpy())
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


class Asks(nn.Module):
    """Looks at the weight, as diffusers' time embedders do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x.to(self.layer.weight.dtype))
        return output


def test_compiled_code_may_look_at_it(layer: Any) -> None:
    x = torch.randn(3, layer.in_features)
    compiled = torch.compile(Asks(layer), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), Asks(layer)(x))
    compiled = torch.compile(
        lambda x: F.linear(x, layer.weight.float()), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), F.linear(x, values(layer).float()))
    assert isinstance(layer.weight, DecodedWeight)
