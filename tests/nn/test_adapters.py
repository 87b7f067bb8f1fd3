"""Low-rank adapters on quantized layers: what they add, and that fusing keeps them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import BadRequest, ShapeMismatch
from mezzotint.fast.passes.fuse_linears import fuse_linears
from mezzotint.kernels import BF16_ACTIVATIONS
from mezzotint.nn import FusedLinearSlice, QuantLinear, SplitLinear
from support.quant_tensors import fp8_tensor, nvfp4_tensor

LAYERS: dict[str, Callable[[], Any]] = {
    "fp8": lambda: QuantLinear(fp8_tensor(), activations=BF16_ACTIVATIONS),
    "nvfp4": lambda: QuantLinear(nvfp4_tensor(), activations=BF16_ACTIVATIONS),
    "pieces": lambda: SplitLinear([fp8_tensor(), nvfp4_tensor()], activations=BF16_ACTIVATIONS),
}


def factors(layer: Any, rank: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
    return down, torch.randn(layer.out_features, rank, generator=generator) / rank**0.5


def merged(layer: Any, x: Tensor, *adapters: tuple[Tensor, Tensor, float]) -> Tensor:
    """The layer's output by its decoded weight with the adapters added to it, in float32."""
    weight = layer.dequantize() + sum(scale * up @ down for down, up, scale in adapters)
    return F.linear(x.float(), weight, layer.dequantize_bias())


def error(output: Tensor, expected: Tensor) -> float:
    return float((output.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_an_adapter_is_the_merged_weight(make: Callable[[], Any]) -> None:
    layer = make()
    x = torch.randn(5, layer.in_features).bfloat16()
    plain, state = layer(x), set(layer.state_dict())
    (down, up), (down2, up2) = factors(layer), factors(layer, 2, seed=1)
    layer.set_adapter("style", down, up, 0.7)
    layer.set_adapter("speed", down2, up2)
    assert error(layer(x), merged(layer, x, (down, up, 0.7), (down2, up2, 1.0))) < 1e-2
    layer.set_adapter("style", down, up, -0.5)
    assert error(layer(x), merged(layer, x, (down, up, -0.5), (down2, up2, 1.0))) < 1e-2
    assert set(layer.state_dict()) == state, "the base format has no place for adapters"
    assert error(layer.weight.float(), layer.dequantize()) < 1e-2
    layer.remove_adapter("style")
    assert error(layer(x), merged(layer, x, (down2, up2, 1.0))) < 1e-2
    layer.remove_adapter("speed")
    assert torch.equal(layer(x), plain)


def test_what_does_not_fit_is_refused() -> None:
    layer = LAYERS["fp8"]()
    down, up = factors(layer)
    for wrong in ((down.T, up), (down, up[1:]), (down[1:], up), (down, up.flatten())):
        with pytest.raises(ShapeMismatch, match="does not fit"):
            layer.set_adapter("style", *wrong)
    with pytest.raises(BadRequest, match="no adapter called"):
        layer.remove_adapter("style")
    with pytest.raises(BadRequest, match="not a valid name"):
        layer.set_adapter("a.b", down, up)


def test_an_adapter_moves_with_the_layer_and_stays_bf16() -> None:
    layer = LAYERS["fp8"]()
    layer.set_adapter("style", *factors(layer))
    layer.to(torch.float16)
    adapter = layer.adapters["adapter_style"]
    assert {adapter.down.dtype, adapter.up.dtype} == {torch.bfloat16}
    assert layer.to("meta").adapters["adapter_style"].down.is_meta


@torch.no_grad()
def test_adapters_survive_fusing() -> None:
    block = nn.ModuleDict({name: QuantLinear(fp8_tensor(seed=i)) for i, name in enumerate("qkv")})
    x = torch.randn(5, 64).bfloat16()
    for name, seed in (("q", 1), ("v", 2)):
        block[name].set_adapter("style", *factors(block[name], seed=seed), 0.7)
    expected = {name: layer(x) for name, layer in block.items()}
    assert fuse_linears(block, [("q", "k", "v")])[0] == 1
    assert all(isinstance(layer, FusedLinearSlice) for layer in block.values())
    for name, layer in block.items():
        assert error(layer(x), expected[name].float()) < 1e-2
    compiled = torch.compile(block["q"].fused.linear, fullgraph=True, backend="aot_eager")
    assert error(compiled(x), torch.cat([*expected.values()], -1).float()) < 1e-2


@torch.no_grad()
def test_adapters_can_be_set_on_fused_layers() -> None:
    block = nn.ModuleDict({name: QuantLinear(fp8_tensor(seed=i)) for i, name in enumerate("qkv")})
    plain = {name: QuantLinear(fp8_tensor(seed=i)) for i, name in enumerate("qkv")}
    x = torch.randn(5, 64).bfloat16()
    down, up = factors(block["k"])
    plain["k"].set_adapter("style", down, up, 0.7)
    fuse_linears(block, [("q", "k", "v")])
    unchanged = {name: layer(x) for name, layer in block.items()}
    block["k"].set_adapter("style", down, up, 0.7)
    for name, layer in block.items():
        assert error(layer(x), plain[name](x).float()) < 1e-2
    block["k"].remove_adapter("style")
    assert all(torch.equal(layer(x), unchanged[name]) for name, layer in block.items())
