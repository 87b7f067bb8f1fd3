"""Fused activations with CPU references for kernels; tests/gpu/test_gpu.py compares the two."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_flux2 import (
    Flux2FeedForward,
    Flux2KVParallelSelfAttnProcessor,
    Flux2ParallelSelfAttention,
)
from diffusers.models.transformers.transformer_z_image import FeedForward as ZImageFeedForward
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn import functional as F

from mezzotint.families import families, family_by_transformer
from mezzotint.families.recipe import Recipe
from mezzotint.fast.fused_layers import (
    ActivationQuantize,
    ColumnSlice,
    FusedActivationLinear,
    QuantizedInputLinear,
    SplitQuantizedInputLinear,
)
from mezzotint.fast.passes import attention_processors, fused_activation
from mezzotint.fast.passes.attention import ATTENTION_BACKENDS
from mezzotint.fast.passes.attention_processors import replace_attn_processors
from mezzotint.fast.passes.compile_blocks import compile_blocks
from mezzotint.fast.passes.deferred_residual import (
    DeferredResidualSingleBlock,
    defer_residuals,
)
from mezzotint.fast.passes.fuse_linears import fuse_linears
from mezzotint.fast.passes.fused_activation import fuse_activations
from mezzotint.generation.pipeline import load
from mezzotint.kernels import Can, Target, fp8_weight, int8_gemm
from mezzotint.kernels.backends.int8_mm import INT8MM
from mezzotint.kernels.backends.reference import Reference
from mezzotint.kernels.ops import nvrtc
from mezzotint.kernels.ops.dequant_fp8.reference import dequant_fp8_reference, prepare_scales
from mezzotint.kernels.ops.gemm_act.op import gemm_act, unavailable_reason
from mezzotint.kernels.ops.gemm_act.reference import gemm_act_reference
from mezzotint.kernels.ops.norm_rope.reference import norm_rope_reference
from mezzotint.kernels.ops.quantize_activation.reference import activation_quantize_reference
from mezzotint.kernels.ops.quantize_int8.op import quantize_int8
from mezzotint.kernels.ops.quantize_int8.reference import quantize_int8_reference
from mezzotint.nn import (
    PREPARED_PREFIX,
    FusedLinearSlice,
    QuantLinear,
    SplitLinear,
    quant_linears,
    unquantized_activations,
    use_backend,
)
from mezzotint.schemes import FP8, INT8
from mezzotint.schemes.int8 import encode_int8
from mezzotint.schemes.minifloats import round_e4m3
from mezzotint.schemes.rotation import regular_hadamard
from mezzotint.tensor import PLAIN, QuantTensor
from support import four_bit_weights as four_bits
from support.errors_of import relative_error
from support.fused_activation_models import NUNCHAKU, published
from support.modulation_models import arguments, result, transformer
from support.quant_tensors import fp8_tensor
from support.restored_models import apply_all, assert_restored, structure, tensors

CPU, H100 = Target("cpu"), Target("cuda", (9, 0))


def quantize_into_reference(x: Tensor, inverse: Tensor, out: Tensor) -> None:
    out[:, : x.shape[1]] = round_e4m3(x.float() * inverse)


class SkippedKernel:
    """A fake kernel for tracing, which needs only the shapes of the results."""

    def __getitem__(self, _grid: Any) -> Any:
        return lambda *_given, **_constants: None


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused_activation, "unavailable_reason", lambda _target: None)
    monkeypatch.setattr(fp8_weight, "FP8_BACKENDS", {"reference"})
    monkeypatch.setattr(fp8_weight, "dequant_fp8", dequant_fp8_reference)
    monkeypatch.setattr(
        Reference,
        "prepare",
        lambda _self, weight: {} if weight.scheme is FP8 else prepare_scales(weight),
    )
    gemm_act.register_kernel("cpu", gemm_act_reference)
    ops = importlib.import_module("mezzotint.kernels.ops.quantize_activation.op")
    ops.quantize_into.register_kernel("cpu", quantize_into_reference)
    monkeypatch.setattr(ops, "wrap_triton", lambda _kernel: SkippedKernel())
    library = torch.library.Library("mezzotint", "IMPL")
    library.impl("activation_quantize", activation_quantize_reference, "CPU")
    importlib.import_module("mezzotint.kernels.ops.norm_rope.op")
    library.impl("norm_rope", norm_rope_reference, "CPU")
    yield
    library._destroy()
    torch.compiler.reset()


def fast(name: str = "demo-fp8") -> tuple[Any, dict[str, Any]]:
    transformer = load("demo", transformer=name, device="cpu", dtype=torch.bfloat16).transformer
    torch.manual_seed(0)
    inputs = family_by_transformer("FluxTransformer2DModel", "").example_inputs(
        transformer.config, families()["flux1"].sampling({}, {}).replace(height=64), 1
    )
    inputs |= {
        "encoder_hidden_states": inputs["encoder_hidden_states"][:, :16],
        "txt_ids": torch.zeros(16, 3),
    }
    wide = {
        name: value.bfloat16()
        for name, value in inputs.items()
        if value.ndim == 3 or name == "pooled_projections"
    }
    return transformer, inputs | wide | {"return_dict": False}


@torch.no_grad()
@pytest.mark.parametrize("name", ["demo-fp8", "demo-nvfp4"])
def test_model_with_fused_gelu_computes_the_same(on_cpu: None, name: str) -> None:
    """GELU's input and output are no longer rounded to BF16; inputs of 4-bit layers are in FP8."""
    model, inputs = fast(name)
    expected = model(**inputs)[0]
    with unquantized_activations(model):
        bf16 = model(**inputs)[0]
    model, inputs = fast(name)
    assert fuse_activations(model, CPU) == (2 * 2 + 3, None)
    fuse_linears(model, families()["flux1"].fusable)
    got = model(**inputs)[0]
    assert 0 < relative_error(got, expected) < (0.05 if name == "demo-fp8" else 0.5)
    assert relative_error(got, bf16) < 1.1 * relative_error(expected, bf16)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(model(**inputs)[0], got)


@torch.no_grad()
def test_model_with_per_row_input_scales_computes_the_same(on_cpu: None) -> None:
    model, inputs = fast()
    for name, layer in quant_linears(model).items():
        assert isinstance(layer, QuantLinear)
        weight = layer.quant_weight
        parts = {part: value for part, value in weight.parts.items() if part != "input_scale"}
        parts |= {} if layer.bias is None else {"bias": layer.bias}
        model.set_submodule(name, QuantLinear(replace(weight, parts=parts, dynamic_input=True)))
    expected = model(**inputs)[0]
    assert fuse_activations(model, CPU) == (2 * 2 + 3, None)
    assert fuse_linears(model, families()["flux1"].fusable)[0] == 2 * 2 + 3
    block = model.single_transformer_blocks[0]
    assert isinstance(block.proj_mlp, FusedLinearSlice)
    assert isinstance(block.act_mlp, ActivationQuantize)
    assert 0 < relative_error(model(**inputs)[0], expected) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("rotated", [False, True])
def test_int8_model_computes_the_same(
    on_cpu: None, rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GELU's output is no longer rounded to BF16 before it is quantized."""
    monkeypatch.setattr(INT8MM, "can", lambda *_: Can())
    monkeypatch.setattr(nvrtc, "unavailable_reason", lambda _target: None)
    monkeypatch.setattr(int8_gemm, "has_fused_gemm", lambda _device: False)
    quantize_int8.register_kernel("cpu", quantize_int8_reference)
    model, inputs = fast()
    for name, layer in quant_linears(model).items():
        parts = encode_int8(layer.dequantize())
        parts |= {"rotation": regular_hadamard(16)} if rotated else {}
        parts |= {} if layer.bias is None else {"bias": layer.bias}
        shape = (layer.out_features, layer.in_features)
        weight = QuantTensor(INT8, PLAIN, shape, parts, dynamic_input=True)
        model.set_submodule(name, QuantLinear(weight))
    expected = model(**inputs)[0]
    assert fuse_activations(model, CPU) == (2 * 2 + 3, None)
    fuse_linears(model, families()["flux1"].fusable)
    assert model.single_transformer_blocks[0].act_mlp.to_int8
    got = model(**inputs)[0]
    assert 0 < relative_error(got, expected) < 0.05
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.equal(model(**inputs)[0], got)


@torch.no_grad()
@pytest.mark.parametrize(
    "other",
    [lambda model: use_backend(model, "weight_only"), unquantized_activations],
    ids=["backend", "inputs"],
)
def test_another_backend_or_bf16_activations_bypass_the_fused_kernel(
    on_cpu: None, other: Any
) -> None:
    model, inputs = fast()
    with other(model):
        expected = model(**inputs)[0]
        fuse_activations(model, CPU)
        assert relative_error(model(**inputs)[0], expected) < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gemm_act_reference_equals_float32(activation: str) -> None:
    torch.manual_seed(0)
    x, codes = (round_e4m3(torch.randn(rows, 32) * 8) for rows in (5, 64))
    inverse, bias = torch.tensor([4.0]), torch.randn(64).bfloat16()
    by_row, by_column = torch.rand(5, 1) / 64, torch.rand(64) / 8
    plain, quantized = gemm_act_reference(
        x, codes, bias, by_row, by_column, inverse, activation, 16, 8
    )
    real = (x.float() * by_row) @ (codes.float() * by_column[:, None]).t() + bias.float()
    assert relative_error(plain.float(), real[:, :16]) < 3e-3
    gate, up = real[:, 16:40], real[:, 40:]
    active = (
        F.silu(gate) * up if activation == "swiglu" else F.gelu(real[:, 16:], approximate="tanh")
    )
    assert quantized.shape == (5, 8 + active.shape[1])
    assert relative_error(quantized[:, 8:].float() / 4, active) < 0.04
    plain_only, nothing = gemm_act_reference(x, codes, bias, by_row, by_column, None, "none", 64, 0)
    assert torch.equal(plain_only, real.bfloat16())
    assert nothing.shape == (5, 0)


def test_qkv_and_mlp_are_one_gemm(on_cpu: None) -> None:
    model, _inputs = fast()
    fuse_activations(model, CPU)
    assert fuse_linears(model, families()["flux1"].fusable)[0] == 2 * 2
    block = model.single_transformer_blocks[0]
    width = block.attn.to_q.out_features
    assert [layer.start for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v)] == [
        0,
        width,
        2 * width,
    ]
    assert isinstance(block.attn.to_q, ColumnSlice)
    assert isinstance(block.proj_out, QuantizedInputLinear)
    assert block.proj_mlp.plain_columns == 3 * width
    assert type(block.proj_mlp) is FusedActivationLinear
    assert model.transformer_blocks[0].ff.net[0].plain_columns == 0


@torch.no_grad()
def test_text_and_image_share_one_qkv_tensor(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = fast()
    fuse_linears(model, families()["flux1"].fusable)
    replace_attn_processors(model, ATTENTION_BACKENDS["sdpa"])
    joint = model(**inputs)[0]
    attn = model.transformer_blocks[0].attn
    assert attention_processors._joint_qkv_layers(attn) == [
        attn.add_q_proj.fused.linear,
        attn.to_q.fused.linear,
    ]
    assert attention_processors._joint_qkv_layers(model.single_transformer_blocks[0].attn) == []
    image, text = (torch.randn(2, tokens, attn.to_q.in_features).bfloat16() for tokens in (16, 5))
    traced = torch.compile(attention_processors._qkv, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(attn, image, text), attention_processors._qkv(attn, image, text))
    monkeypatch.setattr(attention_processors, "_joint_qkv_layers", lambda _attn: [])
    assert relative_error(joint, model(**inputs)[0]) < 1e-2


def fp8_layer(out: int, in_: int, seed: int) -> QuantLinear:
    weight = fp8_tensor(out, in_, seed)
    return QuantLinear(
        weight.with_parts(
            {**weight.parts, "input_scale": torch.tensor((seed + 4) / 448)}, weight.layout
        )
    )


def flux2_feed_forward() -> torch.nn.Module:
    module = Flux2FeedForward(64, mult=2)
    module.linear_in, module.linear_out = fp8_layer(256, 64, 0), fp8_layer(64, 128, 1)
    return module


def recipe(module: torch.nn.Module) -> Recipe:
    """Return the recipe of the family that a module belongs to."""
    return families()["zimage" if isinstance(module, ZImageFeedForward) else "flux2"].fast


def zimage_feed_forward() -> torch.nn.Module:
    module = ZImageFeedForward(64, 128)
    module.w1, module.w3, module.w2 = (
        fp8_layer(128, 64, 0),
        fp8_layer(128, 64, 0),
        fp8_layer(64, 128, 1),
    )
    module.w3.register_buffer("weight_scale", module.w3.get_buffer("weight_scale") / 2)
    return module


def flux2_attention() -> torch.nn.Module:
    module = Flux2ParallelSelfAttention(64, heads=2, dim_head=32, out_dim=64, mlp_ratio=2.0)
    module.to_qkv_mlp_proj, module.to_out = (
        fp8_layer(3 * 64 + 2 * 128, 64, 0),
        fp8_layer(64, 64 + 128, 1),
    )
    return module


@torch.no_grad()
@pytest.mark.parametrize("make", [flux2_feed_forward, zimage_feed_forward, flux2_attention])
def test_swiglu_is_fused_with_the_gemm_before_it(on_cpu: None, make: Any) -> None:
    torch.manual_seed(0)
    module = make().bfloat16().eval()
    if isinstance(module, Flux2ParallelSelfAttention):
        replace_attn_processors(module, ATTENTION_BACKENDS["sdpa"], recipe(module))
        angles = torch.randn(5, 16).repeat_interleave(2, 1)
        inputs = {"image_rotary_emb": (angles.cos(), angles.sin())}
    else:
        inputs = {}
    x = torch.randn(2, 5, 64).bfloat16()
    expected = module(x, **inputs)
    with unquantized_activations(module):
        bf16 = module(x, **inputs)
    assert fuse_activations(module, CPU, recipe(module)) == (1, None)
    (fused,) = (layer for layer in module.modules() if isinstance(layer, FusedActivationLinear))
    assert fused.activation == "swiglu"
    got = module(x, **inputs)
    assert 0 < relative_error(got, expected) < 0.05
    assert relative_error(got, bf16) < 1.1 * relative_error(expected, bf16)
    with unquantized_activations(module):
        assert relative_error(module(x, **inputs), bf16) < 1e-2
    if not inputs:  # norm_rope, a kernel in Triton, cannot be traced without a GPU
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), got)
    unfused = make().eval()
    if isinstance(module, Flux2ParallelSelfAttention):
        replace_attn_processors(unfused, ATTENTION_BACKENDS["sdpa"], recipe(unfused))
    torch.testing.assert_close(
        module.float()(x.float(), **inputs), unfused.float()(x.float(), **inputs)
    )
    assert {fused.scale.dtype, fused.inverse_scale.dtype} == {torch.float32}
    assert torch.equal(fused.scale * fused.inverse_scale, torch.ones(1))


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "last"), [(flux2_feed_forward, "linear_out"), (zimage_feed_forward, "w2")]
)
@pytest.mark.parametrize("possible", [True, False], ids=["hopper", "elsewhere"])
def test_swiglu_and_per_row_quantization_are_one_kernel(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch, make: Any, last: str, possible: bool
) -> None:
    """SiLU is no longer rounded to BF16, so some numbers become the next one in FP8."""
    monkeypatch.setattr(
        fused_activation,
        "unavailable_reason",
        lambda _target: None if possible else "is written for Hopper",
    )
    torch.manual_seed(0)
    module = make().bfloat16().eval()
    layer = getattr(module, last)
    del layer._buffers["input_scale"]
    layer.dynamic_input = True
    x = torch.randn(2, 5, 64).bfloat16()
    expected = module(x)
    with unquantized_activations(module):
        bf16 = module(x)
    assert fuse_activations(module, CPU, recipe(module)) == (1, None)
    assert not any(isinstance(layer, FusedActivationLinear) for layer in module.modules())
    assert isinstance(getattr(module, last), QuantizedInputLinear)
    got = module(x)
    assert 0 < relative_error(got, expected) < 0.02
    assert relative_error(got, bf16) < 1.1 * relative_error(expected, bf16)
    with unquantized_activations(module):
        assert relative_error(module(x), bf16) < 1e-2
    counter = CompileCounter()
    traced = torch.compile(module, fullgraph=True, backend=counter)
    for tokens in (5, 6, 7, 9):  # the second length makes it a variable
        x = torch.randn(2, tokens, 64).bfloat16()
        assert torch.equal(traced(x), module(x))
    assert counter.frame_count == 2
    if make is flux2_feed_forward:
        return
    unfused = make().bfloat16()
    del (
        unfused.w2._buffers["input_scale"],
        unfused.w3._buffers["input_scale"],
    )  # w1 and w3 cannot be fused
    assert fuse_activations(unfused, CPU, recipe(unfused)) == (0, None)


def test_layer_without_static_input_scale_is_quantized_per_row(on_cpu: None) -> None:
    model, _inputs = fast()
    block = model.single_transformer_blocks[0]
    del block.proj_out._buffers["input_scale"]
    assert fuse_activations(model, CPU) == (2 * 2 + 3, None)
    assert isinstance(block.act_mlp, ActivationQuantize)


@torch.no_grad()
def test_activation_is_fused_even_if_qkv_are_not(
    on_cpu: None,
) -> None:
    model, inputs = fast()
    block = model.single_transformer_blocks[0]
    block.attn.to_k.register_buffer("input_scale", block.attn.to_k.get_buffer("input_scale") * 2)
    expected = model(**inputs)[0]
    assert fuse_activations(model, CPU) == (2 * 2 + 3, None)
    assert isinstance(block.attn.to_k, QuantLinear)
    assert block.proj_mlp.plain_columns == 0
    assert 0 < relative_error(model(**inputs)[0], expected) < 0.05


@torch.no_grad()
def test_reason_for_unfused_activations_is_returned(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fused_activation, "unavailable_reason", lambda _target: "is written for Hopper"
    )
    model, inputs = fast()
    expected = model(**inputs)[0]
    assert fuse_activations(model, CPU) == (0, "is written for Hopper")
    assert torch.equal(model(**inputs)[0], expected)
    assert fuse_activations(load("demo", device="cpu").transformer, CPU) == (0, None)


def test_unknown_attention_processor_keeps_its_linear(on_cpu: None) -> None:
    module = flux2_attention()
    module.set_processor(Flux2KVParallelSelfAttnProcessor())
    assert fuse_activations(module, CPU, recipe(module)) == (0, None)
    assert isinstance(module.to_qkv_mlp_proj, QuantLinear)


def test_unavailable_reason_names_the_device() -> None:
    assert unavailable_reason(CPU) == "needs a CUDA GPU, this is cpu"
    assert (
        unavailable_reason(Target("cuda", (8, 9))) == "is written for Hopper (sm_90), this is sm_89"
    )
    if find_spec("cuda") is None:
        assert "needs cuda-bindings" in str(unavailable_reason(H100))


@torch.no_grad()
def test_gelu_and_per_row_quantization_before_a_shifted_layer(on_cpu: None) -> None:
    """SVDQuant's second layer has a shifted input; what the shift adds to the bias is kept."""
    torch.manual_seed(0)
    ff = FeedForward(64, activation_fn="gelu-approximate", mult=2).bfloat16().eval()
    ff.net[2] = layer = QuantLinear(four_bits.all_of(64, 128)["svdquant_int4, shifted"])
    for part, value in prepare_scales(layer.quant_weight).items():
        layer.register_buffer(PREPARED_PREFIX + part, value)
    x = torch.randn(2, 5, 64).bfloat16()
    with unquantized_activations(ff):
        bf16 = ff(x)
    native = ff(x)
    assert fuse_activations(ff, CPU, families()["flux1"].fast) == (1, None)
    assert relative_error(ff(x), bf16) < relative_error(native, bf16)


@torch.no_grad()
@NUNCHAKU
def test_split_proj_out_is_two_gemms(on_cpu: None, data: Path, name: str) -> None:
    """Both quantize the same rows to FP8, but GELU is no longer rounded to BF16 before.

    That changes numbers by up to 2^-9, so some become the next number of FP8, 2^-3 away.
    """
    model, inputs = published(data, name, resident="fp8")
    expected = model(**inputs)[0]
    assert fuse_activations(model, CPU) == (2 + 1, None)
    assert fuse_linears(model, families()["flux1"].fusable)[0] == 2 + 1
    block = model.single_transformer_blocks[0]
    assert isinstance(block.proj_mlp, FusedLinearSlice)
    assert isinstance(block.act_mlp, ActivationQuantize)
    assert isinstance(block.proj_out, SplitQuantizedInputLinear)
    assert 0 < relative_error(model(**inputs)[0], expected) < 0.02


@torch.no_grad()
@NUNCHAKU
def test_split_4_bit_proj_out_reads_fp8(on_cpu: None, data: Path, name: str) -> None:
    model, inputs = published(data, name)
    native = model(**inputs)[0]
    with unquantized_activations(model):
        bf16 = model(**inputs)[0]
    with use_backend(model, "weight_only"):
        decoded = model(**inputs)[0]
    assert fuse_activations(model, CPU) == (2 + 1, None)
    assert isinstance(model.single_transformer_blocks[0].proj_out, SplitQuantizedInputLinear)
    assert relative_error(model(**inputs)[0], bf16) < relative_error(native, bf16), (
        "8 bits instead of 4"
    )
    with unquantized_activations(model):  # as close as two ways of computing GELU in BF16
        assert relative_error(model(**inputs)[0], bf16) < 1e-2
    with use_backend(model, "weight_only"):
        assert relative_error(model(**inputs)[0], decoded) < 1e-2


@torch.no_grad()
def test_split_proj_out_without_fp8_is_unchanged(data: Path) -> None:
    model, inputs = published(data, "nunchaku_flux1_int4_r32")
    expected = model(**inputs)[0]
    assert fuse_activations(model, CPU) == (0, None)
    assert isinstance(model.single_transformer_blocks[0].proj_out, SplitLinear)
    assert torch.equal(model(**inputs)[0], expected)


@pytest.fixture
def short_rows_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow short rows: the demo's have two and three blocks."""
    monkeypatch.setattr("mezzotint.fast.passes.deferred_residual.MIN_BLOCKS", 2)


@torch.no_grad()
@pytest.mark.parametrize(("name", "backend"), [("demo-fp8", "aot_eager"), ("demo-nvfp4", "eager")])
def test_flux1_single_blocks_pass_text_and_image_as_one_residual(
    on_cpu: None, short_rows_allowed: None, name: str, backend: str
) -> None:
    """Sums are rounded to BF16 once, not twice, so some numbers become the next one of FP8.

    All single blocks share one graph, because the first gets inputs of the same kind.
    """
    torch._dynamo.reset()
    (model, inputs), (unfused, _) = fast(name), fast(name)
    for each in (model, unfused):
        fuse_activations(each, CPU)
        fuse_linears(each, families()["flux1"].fusable)
    assert defer_residuals(model) == 1 + 3
    assert [type(block.forward) for block in model.single_transformer_blocks] == [
        DeferredResidualSingleBlock
    ] * 3
    expected = unfused(**inputs)[0]
    assert relative_error(model(**inputs)[0], expected) < 0.03
    counter = CompileCounterWithBackend(backend)
    compile_blocks(model, fullgraph=True, backend=counter)
    assert relative_error(model(**inputs)[0], expected) < 0.03
    assert counter.frame_count == 2 + 1, "two kinds of blocks, and the norm after the last one"


@torch.no_grad()
def test_controlnet_residuals_are_added_to_image_tokens(
    on_cpu: None, short_rows_allowed: None
) -> None:
    (model, inputs), (unfused, _) = fast(), fast()
    for each in (model, unfused):
        fuse_activations(each, CPU)
    defer_residuals(model)
    without = unfused(**inputs)[0]
    sample = torch.randn(*inputs["hidden_states"].shape[:2], unfused.inner_dim).bfloat16()
    for name, blocks in (("controlnet_block_samples", 2), ("controlnet_single_block_samples", 3)):
        inputs[name] = [sample * (index + 1) for index in range(blocks)]
    expected = unfused(**inputs)[0]
    assert relative_error(without, expected) > 0.3
    assert relative_error(model(**inputs)[0], expected) < 0.03


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux1", "flux2", "zimage", "qwenimage"])
def test_restore_undoes_every_pass_on_unquantized_layers(on_cpu: None, name: str) -> None:
    model = transformer(name, 4)
    modules, weights = structure(model), tensors(model)
    inputs = arguments(name, model)
    expected = result(model, inputs)
    sped_up = apply_all(model, name)
    assert structure(model) != modules
    torch.testing.assert_close(result(model, inputs), expected, rtol=1e-4, atol=1e-4)
    sped_up.restore()
    assert_restored(model, modules, weights)
    assert torch.equal(result(model, inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["demo-fp8", "demo-nvfp4", "nunchaku_flux1_int4_r32"])
def test_restore_undoes_fused_activations_and_split_layers(
    on_cpu: None, data: Path, name: str
) -> None:
    model, inputs = fast(name) if name.startswith("demo") else published(data, name, "fp8")
    modules, weights = structure(model), tensors(model)
    expected = model(**inputs)[0]
    sped_up = apply_all(model, "flux1")
    assert structure(model) != modules
    assert not torch.equal(model(**inputs)[0], expected)
    sped_up.restore()
    assert_restored(model, modules, weights)
    assert torch.equal(model(**inputs)[0], expected)
