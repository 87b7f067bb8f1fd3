"""`convert --scheme`: layers of any checkpoint in another scheme, with the error that it adds."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mezzotint
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import BadRequest, BrokenFile, MezzotintError, Unsupported
from mezzotint.families.building import block_linears, build_meta_model
from mezzotint.loading import Placement, load, plan
from mezzotint.nn import quant_linears
from mezzotint.schemes import encoders
from support import gguf_files
from support.checkpoint_edits import WEIGHTS, rewrite
from support.cli_runner import run
from support.digest import digest
from support.modelopt_exporter import in_original_names
from support.original_names import TO_ORIGINAL

LAYER = "transformer_blocks.0.attn.to_q"
CPU = Placement(torch.device("cpu"))
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [16, 24, 24],
}
WAN = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 512,
    "num_layers": 1,
}
MODELS = {"flux": ("flux1", FLUX), "wan": ("wan2.2", WAN)}
"""{architecture in GGUF: (the makers' names, configuration)}"""


def make_q4_k(folder: Path, architecture: str) -> Path:
    """Write a tiny model in makers' names, its blocks' matrices in Q4_K, next to config.json."""
    names, config = MODELS[architecture]
    chance = torch.Generator().manual_seed(0)
    model: Any = getattr(diffusers, str(config["_class_name"]))
    torch.manual_seed(0)
    tensors = in_original_names(model.from_config(config).state_dict(), TO_ORIGINAL[names])
    stored = {
        name: gguf_files.q4_k(*value.shape, chance)
        if "blocks.0." in name and name.endswith(".weight") and value.ndim == 2
        else gguf_files.numbers(value)
        for name, value in tensors.items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return gguf_files.write(folder / "q4_k.gguf", stored, {"general.architecture": architecture})


@pytest.fixture(scope="module", params=list(MODELS))
def q4_k(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_q4_k(tmp_path_factory.mktemp("q4_k") / "model", request.param)


def inputs(checkpoint: Checkpoint) -> dict[str, Tensor]:
    torch.manual_seed(0)
    sampling = mezzotint.Sampling(height=64, steps=1, guidance=1.0, num_frames=1)
    config = build(checkpoint).config
    return checkpoint.family.example_inputs(config, sampling, 1)


def build(checkpoint: Checkpoint) -> Any:
    config = checkpoint.header.config
    return build_meta_model(checkpoint.family.transformer_class, config).eval()


def forward(model: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**arguments, return_dict=False)[0]
    return result


def dequantized(checkpoint: Checkpoint) -> nn.Module:
    """Return the model with the checkpoint's dequantized weights, in float32."""
    state = {name: checkpoint.tensor(name).float() for name in checkpoint.plain}
    for module in checkpoint.modules:
        bias = checkpoint.bias(module)
        state[f"{module}.weight"] = checkpoint.weight(module)
        state |= {} if bias is None else {f"{module}.bias": bias}
    model: nn.Module = build(checkpoint)
    model.load_state_dict(state, assign=True)
    return model


def error_of(module: str, written: Checkpoint, source: Checkpoint) -> float:
    """Compute the added error in float64, apart from the code under test."""
    before = source_weight(source, module).double()
    difference = written.weight(module).double() - before
    return float(difference.square().sum().sqrt() / before.square().sum().sqrt())


def source_weight(source: Checkpoint, module: str) -> Tensor:
    quantized = module in source.linears
    return source.weight(module) if quantized else source.tensor(f"{module}.weight").float()


@pytest.mark.parametrize(
    ("scheme", "to"),
    [
        ("nvfp4", "mezzotint"),
        ("nvfp4", "comfy"),
        ("nvfp4", "modelopt"),
        ("fp8", "comfy"),
        ("mxfp8", "comfy"),
        ("int8", "comfy"),
        ("gguf_q8_0", "gguf"),
    ],
)
def test_q4_k_is_encoded_in_another_scheme_and_the_added_error_is_reported(
    q4_k: Path, tmp_path: Path, scheme: str, to: str
) -> None:
    report = mezzotint.convert(q4_k, tmp_path / "out", to=to, scheme=scheme)
    source, written = Checkpoint.open(q4_k), Checkpoint.open(report.output)
    assert written.report.problems == ()
    assert written.modules == source.modules
    assert {written.scheme(module).name for module in written.modules} == {scheme}
    assert report.layers == {scheme: len(source.modules)}
    assert report.transforms[f"rounded to {encoders()[scheme].title}"] == len(source.modules)
    assert report.errors.keys() == set(source.modules)
    for module in source.modules:
        expected = encoders()[scheme].encode(source.weight(module))
        assert torch.equal(written.weight(module), encoders()[scheme].decode(expected))
        assert report.errors[module] == pytest.approx(error_of(module, written, source), rel=1e-4)
    added = report.added_error
    assert added is not None
    assert added.largest == report.errors[added.layer] == max(report.errors.values())
    assert 0 < added.mean <= added.largest < encoders()[scheme].usual_error
    for name in written.plain:
        assert torch.equal(written.tensor(name).float(), source.tensor(name).float())
    assert mezzotint.verify(report.output).exit_code == 0


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8", "int8"])
def test_an_encoded_model_computes_with_its_dequantized_weights(
    q4_k: Path, tmp_path: Path, scheme: str
) -> None:
    report = mezzotint.convert(q4_k, tmp_path / "out", to="comfy", scheme=scheme)
    written = Checkpoint.open(report.output)
    model, arguments = build(written), inputs(written)
    load(plan(written, model, "bf16"), model, CPU, torch.float32)
    assert sorted(quant_linears(model)) == written.modules
    expected = forward(dequantized(written), arguments)
    torch.testing.assert_close(forward(model, arguments), expected, rtol=1e-4, atol=1e-4)
    source = forward(dequantized(Checkpoint.open(q4_k)), arguments)
    assert (expected - source).norm() < 0.5 * source.norm()
    quantized = build(written)
    load(plan(written, quantized), quantized, CPU, torch.float32)
    layers = quant_linears(quantized).values()
    assert all(layer.quant_weight.quantizes_activation for layer in layers)
    assert (forward(quantized, arguments) - source).norm() < 0.5 * source.norm()


def test_layers_in_the_scheme_stay_as_they_are(fp8: Path, tmp_path: Path) -> None:
    report = mezzotint.convert(fp8, tmp_path / "out", scheme="fp8", to="modelopt")
    assert (report.transforms, report.errors, report.added_error) == ({}, {}, None)
    before, after = (load_file(folder / WEIGHTS) for folder in (fp8, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value.float(), after[name].float()), name


def test_encoding_twice_changes_nothing_more(q4_k: Path, tmp_path: Path) -> None:
    first = mezzotint.convert(q4_k, tmp_path / "first", scheme="nvfp4")
    second = mezzotint.convert(first.output, tmp_path / "second", scheme="nvfp4")
    assert second.transforms == {}
    shard = first.shards[0]
    assert (first.output / shard).read_bytes() == (second.output / shard).read_bytes()


def test_an_unquantized_source_gets_its_block_linears_encoded(data: Path, tmp_path: Path) -> None:
    base = data / "base/flux1"
    report = mezzotint.convert(base, tmp_path / "out", scheme="fp8", keep_bf16=["*.norm*.linear"])
    source, written = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    linears = block_linears(source.model())
    assert set(written.modules) == {
        name for name in linears if not name.endswith("norm.linear") and ".norm1" not in name
    }
    assert 0 < len(linears) - len(written.modules) == 3
    for module in written.modules:
        assert report.errors[module] == pytest.approx(error_of(module, written, source), rel=1e-4)
    for name in written.plain:
        assert torch.equal(written.tensor(name), source.tensor(name))
    with pytest.raises(BadRequest, match="'x_embedder' matches no quantized layer"):
        mezzotint.convert(base, tmp_path / "x", scheme="fp8", keep_bf16=["x_embedder"])


def test_fused_layers_of_the_makers_are_encoded_one_by_one(data: Path, tmp_path: Path) -> None:
    """Each of diffusers' layers gets a scale of its own, as a quantizer of the model gives it."""
    weights = load_file(data / "base/flux1" / WEIGHTS)
    save_file(in_original_names(weights, TO_ORIGINAL["flux1"]), tmp_path / "bfl.safetensors")
    one = mezzotint.convert(tmp_path / "bfl.safetensors", tmp_path / "one", scheme="nvfp4")
    two = mezzotint.convert(data / "base/flux1", tmp_path / "two", scheme="nvfp4")
    assert one.errors == two.errors
    parts, others = (Checkpoint.open(folder).parts(LAYER) for folder in (one.output, two.output))
    assert all(torch.equal(parts[name].float(), others[name].float()) for name in parts)


def test_what_changes_the_input_becomes_part_of_the_weights(data: Path, tmp_path: Path) -> None:
    """Nunchaku's layers have smoothing, low-rank branches, shifts and two pieces."""
    file = next((data / "nunchaku_flux1_int4_r32/checkpoint").glob("*.safetensors"))
    source = Checkpoint.open(file)
    report = mezzotint.convert(file, tmp_path / "out", scheme="fp8", to="comfy")
    written = Checkpoint.open(report.output)
    assert written.modules == source.modules
    for module in source.modules:
        assert report.errors[module] == pytest.approx(error_of(module, written, source), rel=1e-3)
        bias, expected = written.bias(module), source.bias(module)
        if expected is not None:
            assert bias is not None
            torch.testing.assert_close(bias, expected, rtol=2**-8, atol=2**-8)


def test_a_static_input_scale_is_dropped_and_named(fp8: Path, tmp_path: Path) -> None:
    report = mezzotint.convert(fp8, tmp_path / "out", scheme="int8")
    number = len(report.errors)
    assert report.transforms == {
        "rounded to INT8": number,
        "without their static input scale": number,
    }
    written = Checkpoint.open(tmp_path / "out")
    (piece,) = written.outline(LAYER).pieces
    assert piece.quantizes_activation
    assert "input_scale" not in piece.parts


def test_layers_that_the_scheme_cannot_hold_stay_and_are_named(data: Path, tmp_path: Path) -> None:
    report = mezzotint.convert(data / "gguf/wan.gguf", tmp_path / "out", scheme="svdquant_int4")
    written = Checkpoint.open(tmp_path / "out")
    assert report.kept["blocks.0.attn1.to_q"] == (
        "has 32 input features, and SVDQuant INT4 needs a multiple of 64"
    )
    assert {m for m in written.modules if written.scheme(m).name == "svdquant_int4"} == set(
        report.errors
    )
    assert report.errors.keys() | report.kept.keys() == set(written.modules)


@pytest.mark.parametrize(
    ("scheme", "to", "error", "message"),
    [
        ("nvfp4", "gguf", Unsupported, "is NVFP4, and GGUF stores its own block types"),
        ("gguf_q8_0", "comfy", Unsupported, "is GGUF Q8_0, and ComfyUI has no such format"),
        ("fp8", "modelopt", Unsupported, "has no input_scale, which ModelOpt's FP8"),
        ("svdquant_nvfp4", "nunchaku", Unsupported, "has no proj_down, proj_up, smooth"),
        ("svdquant_int4", "row-major", Unsupported, "has no proj_down, proj_up, smooth"),
        ("fp8", "bf16", BadRequest, "--to bf16 writes unquantized layers"),
        ("fp8", "gguf-q8_0", BadRequest, "--to gguf-q8_0 writes GGUF Q8_0, and --scheme is fp8"),
        ("gguf_q4_k", "gguf", BadRequest, "there is no scheme 'gguf_q4_k'"),
    ],
)
def test_combinations_that_are_refused(
    data: Path, tmp_path: Path, scheme: str, to: str, error: type[MezzotintError], message: str
) -> None:
    with pytest.raises(error, match=message):
        mezzotint.convert(data / "base/flux1", tmp_path / "out", scheme=scheme, to=to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error(data: Path, tmp_path: Path, value: float) -> None:
    source = tmp_path / "source"
    mezzotint.convert(data / "base/flux1", source, to="bf16")
    rewrite(source, lambda tensors: tensors[f"{LAYER}.weight"][0].fill_(value))
    with pytest.raises(BrokenFile, match=rf"{LAYER}\.weight holds a value that is not finite"):
        mezzotint.convert(source, tmp_path / "out", scheme="int8")
    assert not (tmp_path / "out").exists()


def test_a_killed_run_is_continued_and_reports_every_error(q4_k: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheme": "nvfp4", "shard_bytes": 300_000}
    whole = mezzotint.convert(q4_k, tmp_path / "whole", **options)

    def kill(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mezzotint.convert(q4_k, tmp_path / "out", **options, on_progress=kill)
    assert not (tmp_path / "out").exists()
    report = mezzotint.convert(q4_k, tmp_path / "out", **options)
    assert report.resumed
    assert report.errors == whole.errors
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_the_command_prints_the_added_error(tmp_path: Path) -> None:
    done = run("convert", "demo-fp8", "--scheme", "nvfp4", "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "transform: 46 layers rounded to NVFP4" in done.stdout
    assert "added error of the weights: 0.09" in done.stdout
    done = run("convert", "demo-fp8", "--scheme", "nvfp4", "-o", str(tmp_path / "b"), "--json")
    report = json.loads(done.stdout)
    assert report["added_error"]["largest"] == report["errors"][report["added_error"]["layer"]]
    assert len(report["errors"]) == 46
    assert report["kept"] == {}
