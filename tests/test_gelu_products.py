"""A product with its GELU, by its definition in the kernel's place; tests/test_gpu.py holds the kernel to that."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward

import four_bits
from mezzotint.families import families, family_with
from mezzotint.kernels import Target, fp8_matrix
from mezzotint.kernels.cublaslt import gelu_product, gelu_product_by_definition, missing
from mezzotint.kernels.expand import expand_by_definition, prepared
from mezzotint.nn import PREPARED, GroupedLinear, QuantLinear, quant_linears, unrounded_inputs, use_backend
from mezzotint.pipelines import load
from mezzotint.schemes import FP8
from mezzotint.schemes.rounding import round_e4m3
from mezzotint.speed import gelu_products
from mezzotint.speed.fusing import fuse
from mezzotint.speed.gelu_products import (
    GELUProduct,
    GELURounding,
    RoundedLinear,
    gelu_round_by_definition,
    replace_gelu_products,
)
from test_expand import relative_error

CPU, H100 = Target("cpu"), Target("cuda", (9, 0))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gelu_products, "missing", lambda _target: None)
    monkeypatch.setattr(fp8_matrix, "BACKENDS", {"reference"})
    monkeypatch.setattr(fp8_matrix, "expand", expand_by_definition)
    gelu_product.register_kernel("cpu", gelu_product_by_definition)
    importlib.import_module("mezzotint.kernels.triton_ops.round")
    library = torch.library.Library("mezzotint", "IMPL")
    library.impl("gelu_round", gelu_round_by_definition, "CPU")
    yield
    library._destroy()
    torch.compiler.reset()


def fast(name: str = "demo-fp8") -> tuple[Any, dict[str, Any]]:
    transformer = load("demo", transformer=name, device="cpu", dtype=torch.bfloat16).transformer
    for layer in quant_linears(transformer).values():
        if layer.scheme is not FP8:  # as `expand` has them
            for part, value in prepared(layer.weight_tensor).items():
                layer.register_buffer(PREPARED + part, value)
    torch.manual_seed(0)
    given = family_with("FluxTransformer2DModel", "").example(
        transformer.config, families()["flux1"].sampling({}, {}).but(size=64), 1
    )
    given |= {"encoder_hidden_states": given["encoder_hidden_states"][:, :16], "txt_ids": torch.zeros(16, 3)}
    wide = {name: value.bfloat16() for name, value in given.items() if value.ndim == 3 or name == "pooled_projections"}
    return transformer, given | wide | {"return_dict": False}


@torch.no_grad()
@pytest.mark.parametrize("name", ["demo-fp8", "demo-nvfp4"])
def test_a_model_with_gelu_in_its_products_computes_the_same(on_cpu: None, name: str) -> None:
    """Up to the rounding to BF16 that no longer happens before GELU and after it; 4 bits with inputs in FP8."""
    model, inputs = fast(name)
    expected = model(**inputs)[0]
    with unrounded_inputs():
        exact = model(**inputs)[0]
    model, inputs = fast(name)
    assert replace_gelu_products(model, CPU) == 2 * 2 + 3
    fuse(model, families()["flux1"].together)
    got = model(**inputs)[0]
    assert 0 < relative_error(got, expected) < (0.05 if name == "demo-fp8" else 0.5)
    assert relative_error(got, exact) < 1.1 * relative_error(expected, exact)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.equal(model(**inputs)[0], got)


@torch.no_grad()
def test_a_model_whose_inputs_have_a_scale_for_each_row_computes_the_same(on_cpu: None) -> None:
    model, inputs = fast()
    for name, layer in quant_linears(model).items():
        assert isinstance(layer, QuantLinear)
        weight = layer.weight_tensor
        parts = {part: value for part, value in weight.parts.items() if part != "input_scale"}
        parts |= {} if layer.bias is None else {"bias": layer.bias}
        model.set_submodule(name, QuantLinear(replace(weight, parts=parts, dynamic_input=True)))
    expected = model(**inputs)[0]
    assert replace_gelu_products(model, CPU) == 2 * 2 + 3
    assert fuse(model, families()["flux1"].together)[0] == 2 * 2 + 3
    block = model.single_transformer_blocks[0]
    assert isinstance(block.proj_mlp, GroupedLinear)
    assert isinstance(block.act_mlp, GELURounding)
    assert 0 < relative_error(model(**inputs)[0], expected) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("other", [lambda: use_backend("weight_only"), unrounded_inputs], ids=["backend", "inputs"])
def test_another_backend_or_exact_inputs_get_the_layers_themselves(on_cpu: None, other: Any) -> None:
    model, inputs = fast()
    with other():
        expected = model(**inputs)[0]
        replace_gelu_products(model, CPU)
        assert relative_error(model(**inputs)[0], expected) < 1e-2


@torch.no_grad()
def test_what_stands_beside_a_product_is_rounded_as_the_next_layer_reads_it() -> None:
    torch.manual_seed(0)
    x, codes = (round_e4m3(torch.randn(rows, 32) * 8) for rows in (5, 48))
    one, inverse, beside = torch.ones(1), torch.tensor([4.0]), torch.randn(5, 16)
    wide = gelu_product_by_definition(x, codes, None, one / 64, one / 8, inverse, beside)
    assert wide.shape == (5, 64)
    assert torch.equal(wide[:, :16].float(), round_e4m3(beside * 4).float())
    alone = gelu_product_by_definition(x, codes, None, one / 64, one / 8, inverse, None)
    assert torch.equal(wide[:, 16:].float(), alone.float())
    expected = torch.nn.functional.gelu(x.float() @ codes.float().t() / 512, approximate="tanh")
    assert relative_error(alone.float() / 4, expected) < 0.04


def test_the_input_of_side_by_side_layers_is_rounded_once(on_cpu: None) -> None:
    model, _inputs = fast()
    replace_gelu_products(model, CPU)
    fuse(model, families()["flux1"].together)
    block = model.single_transformer_blocks[0]
    assert block.attn.to_q.joined.input_scale is block.proj_mlp.layer.input_scale
    assert isinstance(block.proj_out, RoundedLinear)
    assert isinstance(block.proj_mlp, GELUProduct)


def test_layers_with_scales_by_row_stay_as_they_are_and_dynamic_inputs_are_rounded_by_row(on_cpu: None) -> None:
    model, _inputs = fast()
    first = model.transformer_blocks[0].ff.net[0]
    weight = first.proj.weight_tensor
    scale = weight.parts["weight_scale"].reshape(-1).expand(weight.shape[0])
    first.proj = QuantLinear(weight.with_parts({**weight.parts, "weight_scale": scale}, weight.layout))
    block = model.single_transformer_blocks[0]
    del block.proj_out._buffers["input_scale"]
    assert replace_gelu_products(model, CPU) == 2 * 2 + 3 - 1
    assert isinstance(model.transformer_blocks[0].ff.net[0].proj, QuantLinear)
    assert isinstance(block.act_mlp, GELURounding)


def test_it_says_where_it_cannot_run() -> None:
    assert missing(CPU) == "needs a CUDA GPU, this is cpu"
    assert missing(Target("cuda", (8, 9))) == "was run on Hopper (sm_90) only, this is sm_89"
    if torch.version.cuda is None:
        assert "finds no cuBLASLt" in str(missing(H100))


@torch.no_grad()
def test_inputs_with_a_scale_for_each_row_are_rounded_behind_gelu(on_cpu: None) -> None:
    """SVDQuant's, whose second layer is shifted: what that shift adds to the bias is kept."""
    torch.manual_seed(0)
    ff = FeedForward(64, activation_fn="gelu-approximate", mult=2).bfloat16().eval()
    ff.net[2] = layer = QuantLinear(four_bits.all_of(64, 128)["svdquant_int4, shifted"])
    for part, value in prepared(layer.weight_tensor).items():
        layer.register_buffer(PREPARED + part, value)
    x = torch.randn(2, 5, 64).bfloat16()
    with unrounded_inputs():
        exact = ff(x)
    native = ff(x)
    assert replace_gelu_products(ff, CPU) == 1
    assert relative_error(ff(x), exact) < relative_error(native, exact)
