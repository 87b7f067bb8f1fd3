"""`speed_up` keeps results: fused linears, attention, GELU; and its choices and reports."""

import copy
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

from mezzotint.bench import PUBLISHED_MODELS, BenchCase, markdown, published_model, warnings
from mezzotint.bench.measure import Measurement, flops
from mezzotint.bench.random_model import block_linears
from mezzotint.costs import Memory, Percentiles
from mezzotint.errors import BadRequest, Unsupported
from mezzotint.families import families, family_by_transformer
from mezzotint.families.building import build_meta_model
from mezzotint.fast import compile_cache_folder, speed_up
from mezzotint.fast.activations import tanh_gelu
from mezzotint.fast.passes.attention import ATTENTION_BACKENDS, select_attention
from mezzotint.fast.passes.attention_processors import replace_attn_processors
from mezzotint.fast.passes.fuse_linears import fuse_linears
from mezzotint.fast.runtime.recompile_warning import RecompileWarning
from mezzotint.fast.runtime.weight_watcher import WeightWatcher
from mezzotint.generation.generate import generate
from mezzotint.generation.pipeline import load, recommended_sampling
from mezzotint.kernels import Target
from mezzotint.kernels.ops.norm_rope.reference import norm_rope_reference
from mezzotint.nn import FusedLinear, FusedLinearSlice, QuantLinear
from support import tiny_pipelines as tiny
from support.cli_runner import run
from support.quant_tensors import fp8_tensor

TINY = {
    "flux1": tiny.flux1,
    "flux2": tiny.flux2,
    "zimage": tiny.zimage,
    "qwenimage": tiny.qwenimage,
}


@pytest.mark.parametrize("name", ["demo-fp8", "demo-nvfp4"])
def test_fused_linears_give_the_same_output(name: str) -> None:
    pipe = load("demo", transformer=name, device="cpu", dtype=torch.float32)
    inputs = family_by_transformer("FluxTransformer2DModel", "").example_inputs(
        pipe.transformer.config, families()["flux1"].sampling({}, {}).replace(height=64), 1
    )
    inputs |= {
        "encoder_hidden_states": inputs["encoder_hidden_states"][:, :16],
        "txt_ids": torch.zeros(16, 3),
    }
    with torch.no_grad():
        expected = pipe.transformer(**inputs)[0]
        count, unfused = fuse_linears(pipe.transformer, families()["flux1"].fusable)
        fused_output = pipe.transformer(**inputs)[0]
    assert (count, unfused) == (2 * 2 + 3, [])
    assert torch.equal(fused_output, expected)


class Sum(nn.Module):
    """Two layers with the same input."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.a, self.b = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


@torch.no_grad()
def test_dynamo_traces_a_fused_group() -> None:
    """tests/fast/test_compiled_models.py compiles those of every family."""
    model = Sum([QuantLinear(fp8_tensor(48, 64, seed), torch.float32) for seed in (0, 1)])
    x = torch.randn(3, 64)
    assert fuse_linears(model, [("a", "b")]) == (1, [])
    expected = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), expected)


def test_fused_slices_called_in_any_order_give_their_own_output() -> None:
    layers = [QuantLinear(fp8_tensor(48, 64, seed), torch.float32) for seed in (0, 1)]
    model = nn.ModuleDict({"a": layers[0], "b": layers[1]})
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    expected = [layers[0](x), layers[1](other), layers[1](x)]
    assert fuse_linears(model, [("a", "b")]) == (1, [])
    assert all(isinstance(layer, FusedLinearSlice) for layer in model.values())
    for got, want in zip((model["a"](x), model["b"](other), model["b"](x)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_fused_linear_frees_its_output_once_every_slice_was_read() -> None:
    group = FusedLinear(QuantLinear(fp8_tensor(48, 64), torch.float32), [16, 32])
    x = torch.randn(2, 64)
    assert group.slice_output(x, 1).shape == (2, 32)
    assert group.slice_output(x, 0).shape == (2, 16)
    assert group.input is None
    assert group.output is None
    assert torch.equal(group.slice_output(x, 0, 2), group.linear(x))
    assert group.output is None


def test_layers_with_different_input_scales_stay_unfused_with_a_reason() -> None:
    one, two = fp8_tensor(48, 64, 0), fp8_tensor(48, 64, 1)
    two = two.with_parts({**two.parts, "input_scale": two.parts["input_scale"] * 2}, two.layout)
    model = nn.ModuleDict({"block": nn.ModuleDict({"a": QuantLinear(one), "b": QuantLinear(two)})})
    count, (unfused,) = fuse_linears(model, [("a", "b")])
    assert count == 0
    assert unfused.layers == ("block.a", "block.b")
    assert "their input_scale differ" in unfused.reason


@pytest.fixture
def reference_on_cpu() -> Iterator[None]:
    """Run the reference of norm_rope on the CPU."""
    importlib.import_module("mezzotint.kernels.ops.norm_rope.op")
    library = torch.library.Library("mezzotint", "IMPL")
    library.impl("norm_rope", norm_rope_reference, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("name", TINY)
def test_fused_norm_rope_attention_equals_diffusers(name: str, reference_on_cpu: None) -> None:
    torch.manual_seed(0)
    model = TINY[name]().transformer.float().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1)
    family = families()[name]
    inputs = family.example_inputs(model.config, family.sampling({}, {}).replace(height=64), 1) | {
        "return_dict": False
    }
    if "cap_feats" in inputs:  # the tiny model has positions for 128 tokens
        inputs["cap_feats"] = [text[:16] for text in inputs["cap_feats"]]
    with torch.no_grad():
        expected = model(**inputs)[0]
        count = replace_attn_processors(model, ATTENTION_BACKENDS["sdpa"])
        got = model(**inputs)[0]
    assert count
    expected, got = (x if isinstance(x, torch.Tensor) else x[0] for x in (expected, got))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_tanh_gelu_equals_pytorchs() -> None:
    x = torch.linspace(-20, 20, 10_001)
    torch.testing.assert_close(
        tanh_gelu(x), nn.functional.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("cls", sorted({shape.transformer for shape in PUBLISHED_MODELS.values()}))
def test_every_fusable_name_is_a_layer_of_the_model(cls: str) -> None:
    model = build_meta_model(cls, {})
    names = block_linears(model)
    for group in family_by_transformer(cls, "").fusable:
        assert all(any(name.endswith(f".{member}") for name in names) for member in group)
    for end in family_by_transformer(cls, "").modulation_layers:
        assert any(name.endswith(end) for name in names)


def test_recompile_warning_is_logged_once_per_shape(caplog: pytest.LogCaptureFixture) -> None:
    class Identity(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return x

    model = Identity()
    model.forward = RecompileWarning(model)  # type: ignore[method-assign]
    for length in (4, 4, 6, 4, 6):
        model(x=torch.zeros(1, length))
    assert [record.message.split("`")[0] for record in caplog.records] == [
        "Identity compiles for a new input shape: x 1x4 -> 1x6. "
    ]
    model(x=torch.zeros(1, 6), mask=torch.zeros(2, 2))
    model(torch.zeros(1, 6))
    assert "mask absent -> 2x2" in caplog.records[1].message
    assert len(caplog.records) == 2
    assert list(inspect.signature(model.forward).parameters) == ["x", "mask"], (
        "pipelines inspect the signature"
    )


def test_replaced_or_moved_weights_are_detected_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    weights = WeightWatcher(model)
    detected = lambda: (weights.has_changed(), weights.has_changed())  # noqa: E731
    assert detected() == (True, False)
    model[0].weight.data = model[0].weight.data.clone()
    assert detected() == (True, False)
    model[1].register_buffer("running_mean", torch.ones(4))
    assert detected() == (True, False)
    model[0] = nn.Sequential(model[0], nn.Linear(4, 4))  # as when a LoRA is loaded
    assert detected() == (True, False)
    model[0][1].bias.data = torch.ones(4)
    assert detected() == (True, False)
    for _ in range(20):
        model[0][1] = nn.Linear(4, 4)  # perhaps at the address of the last one
        assert detected() == (True, False)
    model[0][1].add_module("adapter", nn.Identity())
    assert detected() == (True, False)
    model[0][1].register_buffer("scale", torch.ones(4))
    assert detected() == (True, False)
    weight = model[0][1].weight
    weight.data = weight.data.view(torch.int32).view(torch.float32)
    assert detected() == (False, False)
    weight.requires_grad = False
    weight.data = weight.data.view(torch.int32)
    assert detected() == (True, False), "another dtype at the same address"
    weight.data = weight.data.view(torch.float32)
    assert detected() == (True, False)
    model.double()
    assert detected() == (True, False)
    model(torch.zeros(2, 4, dtype=torch.float64))
    model[0][1].weight.data.mul_(2)
    assert detected() == (False, False), "in-place changes need no new recording"


def test_attention_selection_and_reasons() -> None:
    chosen, declined = select_attention(Target("cpu"))
    assert chosen.name == "sdpa"
    assert declined["cudnn"] == "needs an NVIDIA GPU, this is cpu"
    assert "written for Hopper" in select_attention(Target("cuda", (8, 9)))[1]["fa3"]
    assert select_attention(Target("cuda", (8, 9)))[0].name == "cudnn"
    with pytest.raises(BadRequest, match="there is no attention backend 'flash'"):
        select_attention(Target("cpu"), "flash")
    with pytest.raises(Unsupported, match="fa3_fp8"):
        select_attention(Target("cpu"), "fa3_fp8")


def test_fp8_attention_is_never_the_default() -> None:
    assert [
        name for name, attention in ATTENTION_BACKENDS.items() if not attention.selected_by_default
    ] == ["fa3_fp8"]


@pytest.mark.parametrize(
    ("model", "tflop"),
    [
        ("flux1-dev", 74.4),
        ("flux2-klein-4b", 34.8),
        ("wan2.2-a14b", 1678),
        ("z-image-turbo", 62.5),
        ("qwen-image", 78.3),
    ],
)
def test_flops_of_published_models(model: str, tflop: float) -> None:
    """For FLUX.1, GEMMs have 59.5 TFLOP and attention 14.9: shared/spec/models.md, section 2."""
    assert flops(BenchCase(model, "bf16", published_model(model).sampling)) / 1e12 == pytest.approx(
        tflop, rel=0.01
    )


def measured(scheme: str, ms: float) -> Measurement:
    nothing = Memory("", None, None, 10**9, None, None, "")
    case = BenchCase("flux1-dev", scheme, published_model("flux1-dev").sampling)
    return Measurement(
        case,
        Percentiles(ms, ms, ms, 20),
        1.0,
        2.0,
        {"bfloat16": 10**9},
        nothing,
        500.0,
        {},
        "cudnn",
        {},
    )


def test_bench_warns_of_a_quantized_model_slower_than_bf16() -> None:
    results = [measured("bf16", 100.0), measured("fp8", 50.0), measured("nvfp4", 120.0)]
    (warning,) = warnings(results)
    assert "nvfp4 is SLOWER than BF16: 120.0 ms against 100.0 ms" in warning
    assert "| 2.00 |" in markdown(results)


def test_speed_up_reports_and_warns_of_new_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pipe = load("demo", transformer="demo-fp8", device="cpu")
    compiled: list[Any] = []
    monkeypatch.setattr(
        "mezzotint.fast.passes.compile_blocks.compile_blocks",
        lambda _model, _edits, **options: compiled.append(options),
    )
    report = speed_up(pipe.transformer, scheduler=pipe.scheduler).report
    assert (
        report.attention,
        report.fused_groups,
        report.uses_cuda_graphs,
        report.fused_attention,
    ) == ("sdpa", 7, False, 0)
    assert report.precomputed_layers == 0
    assert report.compile_cache == str(tmp_path)
    assert compiled == [{"fullgraph": True, "backend": "inductor"}]
    for size in (64, 64, 32):
        generate(
            pipe,
            ["a"],
            sampling=recommended_sampling("demo").replace(steps=1, height=size),
            check_output=False,
        )
    (record,) = [
        record
        for record in caplog.records
        if record.name == "mezzotint.fast.runtime.recompile_warning"
    ]
    assert "hidden_states 1x64x48 -> 1x16x48" in record.message
    copy.copy(report).to_dict()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("nosuch",), "there is no model 'nosuch'"),
        (("flux1-dev", "--scheme", "int3"), "there is no scheme 'int3'"),
        (("flux1-dev", "--attention", "flash"), "there is no attention backend 'flash'"),
        (("flux1-dev", "--resident", "int8"), "there is no residency mode 'int8'"),
        (("flux1-dev", "--no-baseline"), "no CUDA GPU was found"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="would be measured")
def test_bench_checks_names_before_it_needs_a_gpu(wrong: tuple[str, ...], said: str) -> None:
    done = run("bench", *wrong)
    assert (done.returncode, said in done.stderr) == (2, True)


def test_compile_cache_folder_is_the_documented_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An import of diffusers makes PyTorch set the variable to a temporary folder; ignore it."""
    page = (Path(__file__).parents[2] / "docs/performance.md").read_text()
    assert "`~/.cache/mezzotint/inductor`" in page
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    cache_dir()  # what an import of diffusers does
    assert compile_cache_folder() == tmp_path / ".cache/mezzotint/inductor"
    assert compile_cache_folder() == Path(cache_dir())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    assert compile_cache_folder() == tmp_path / "own"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compile_cache_folder() == tmp_path / "cache/mezzotint/inductor"
