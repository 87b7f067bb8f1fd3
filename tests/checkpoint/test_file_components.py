"""`--component` of all-in-one files: text encoders and VAEs are described, and extracted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mezzotint
from mezzotint.errors import BadRequest, NotACheckpoint, Unsupported
from support import gguf_files, tiny_pipelines
from support.checkpoint_edits import WEIGHTS
from support.cli_runner import run

TRANSFORMER, VAE = "model.diffusion_model.", "vae."
T5, CLIP = "text_encoders.t5xxl.transformer.", "text_encoders.clip_l.transformer."
LAYER = "encoder.block.0.layer.0.SelfAttention.q"
Tensors = dict[str, Tensor]


def note(**said: object) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": value.contiguous().clone() for name, value in tensors.items()}


def encoder() -> Tensors:
    """A T5 with one layer in FP8, as ComfyUI stores it."""
    tensors = {n: v.bfloat16() for n, v in tiny_pipelines.t5("T5EncoderModel").state_dict().items()}
    scale = tensors[f"{LAYER}.weight"].float().abs().amax() / 448
    codes = (tensors[f"{LAYER}.weight"].float() / scale).to(torch.float8_e4m3fn)
    return tensors | {
        f"{LAYER}.weight": codes,
        f"{LAYER}.weight_scale": scale,
        f"{LAYER}.comfy_quant": note(format="float8_e4m3fn"),
    }


def vae() -> Tensors:
    """A VAE in the makers' names, which begin as diffusers' do not."""
    return {
        "decoder.conv_in.weight": torch.randn(8, 4, 3, 3),
        "encoder.down.0.block.0.conv1.weight": torch.randn(8, 8, 3, 3),
    }


@pytest.fixture
def parts(data: Path) -> dict[str, Tensors]:
    torch.manual_seed(0)
    transformer = load_file(data / "base/flux1" / WEIGHTS)
    clip = tiny_pipelines.clip().state_dict()
    return {TRANSFORMER: transformer, T5: encoder(), CLIP: clip, VAE: vae()}


@pytest.fixture
def file(parts: dict[str, Tensors], tmp_path: Path) -> Path:
    """An all-in-one file; its header says of one layer of the text encoder what it is."""
    tensors = {k: v for prefix, own in parts.items() for k, v in under(prefix, own).items()}
    layers = {f"{T5}{LAYER}": {"format": "float8_e4m3fn"}}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(tensors, tmp_path / "all.safetensors", metadata)
    return tmp_path / "all.safetensors"


def test_the_transformer_is_inspected_and_the_others_are_named(file: Path) -> None:
    report = mezzotint.inspect(file)
    assert (report.family, report.problems) == ("FLUX.1", ())
    assert "--component clip_l or t5xxl or vae reads them" in report.notes[-1]
    same = mezzotint.inspect(file, component="transformer")
    assert same.stored_bytes == report.stored_bytes


def test_a_text_encoder_is_described(file: Path, parts: dict[str, Tensors]) -> None:
    report = mezzotint.inspect_component(file, "t5xxl")
    own = parts[T5]
    assert (report.component, report.kind) == ("t5xxl", "text_encoder")
    assert report.tensors == len(own)
    assert report.stored_bytes == sum(value.nbytes for value in own.values())
    assert report.dtypes["float8_e4m3fn"] == own[f"{LAYER}.weight"].nbytes
    assert (report.format, report.schemes) == ("ComfyUI single file", {"fp8": 1})
    plain = mezzotint.inspect_component(file, "clip_l")
    assert (plain.tensors, plain.schemes) == (len(parts[CLIP]), {})
    assert "unquantized" in plain.format


@pytest.mark.parametrize(("component", "prefix"), [("t5xxl", T5), ("clip_l", CLIP), ("vae", VAE)])
def test_a_component_is_extracted_byte_for_byte(
    file: Path, parts: dict[str, Tensors], tmp_path: Path, component: str, prefix: str
) -> None:
    report = mezzotint.extract_component(file, tmp_path / "part", component)
    assert report.output == tmp_path / "part.safetensors"
    written = load_file(report.output)
    assert written.keys() == parts[prefix].keys()
    for name, value in parts[prefix].items():
        assert written[name].dtype == value.dtype
        assert torch.equal(written[name].float(), value.float())
    with safe_open(report.output, framework="pt") as opened:
        metadata = opened.metadata()
    said = json.loads(metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"]
    assert ("from_single_file" in report.component.names) == (component == "vae")
    assert said == ({LAYER: {"format": "float8_e4m3fn"}} if component == "t5xxl" else {})
    again = mezzotint.extract_component(file, tmp_path / "part", component, overwrite=True)
    assert again.nbytes == report.output.stat().st_size
    with pytest.raises(BadRequest, match="already exists"):
        mezzotint.extract_component(file, tmp_path / "part", component)


def test_transformers_loads_an_extracted_text_encoder(file: Path, tmp_path: Path) -> None:
    report = mezzotint.extract_component(file, tmp_path / "clip", "clip_l")
    model = tiny_pipelines.clip()
    missing = model.load_state_dict(load_file(report.output), strict=True)
    assert not missing.missing_keys
    assert report.component.names == "transformers' names"


def test_a_kind_names_the_only_component_of_it(file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="2 components of kind text_encoder: clip_l, t5xxl"):
        mezzotint.inspect_component(file, "text_encoder")
    tensors = {k: v for k, v in load_file(file).items() if not k.startswith(CLIP)}
    save_file(tensors, tmp_path / "one.safetensors")
    report = mezzotint.inspect_component(tmp_path / "one.safetensors", "text_encoder")
    assert report.component == "t5xxl"


@pytest.mark.parametrize(
    ("prefix", "name", "kind"),
    [
        ("cond_stage_model.transformer.", "cond_stage_model", "text_encoder"),
        ("conditioner.embedders.0.transformer.", "conditioner.embedders.0", "text_encoder"),
        ("text_encoder_2.", "text_encoder_2", "text_encoder"),
        ("umt5xxl.", "umt5xxl", "text_encoder"),
        ("first_stage_model.", "first_stage_model", "vae"),
        ("audio_vae.", "audio_vae", "other"),
    ],
)
def test_other_prefixes_of_components(
    file: Path, tmp_path: Path, prefix: str, name: str, kind: str
) -> None:
    tensors = load_file(file) | {f"{prefix}a.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "more.safetensors")
    report = mezzotint.extract_component(tmp_path / "more.safetensors", tmp_path / "out", name)
    assert (report.component.kind, list(load_file(report.output))) == (kind, ["a.weight"])


def test_what_is_not_there_is_refused(file: Path, tmp_path: Path, data: Path) -> None:
    with pytest.raises(BadRequest, match="has no component unet") as error:
        mezzotint.extract_component(file, tmp_path / "x", "unet")
    assert "transformer, clip_l, t5xxl, vae" in error.value.hint
    with pytest.raises(BadRequest, match="is a folder"):
        mezzotint.inspect_component(data / "base/flux1", "vae")
    with pytest.raises(NotACheckpoint, match="has no component vae"):
        mezzotint.inspect(file, component="vae")
    blocks = gguf_files.blocks(torch.ones(2, 32))
    gguf = gguf_files.write(tmp_path / "a.gguf", {"vae.a.weight": blocks})
    with pytest.raises(Unsupported, match="in blocks of Q8_0, which safetensors cannot hold"):
        mezzotint.extract_component(gguf, tmp_path / "x", "vae")
    assert not list(tmp_path.glob("*x*"))


def test_the_commands_read_a_component(file: Path, tmp_path: Path) -> None:
    done = run("inspect", str(file), "--component", "t5xxl")
    assert done.returncode == 0, done.stderr
    assert "1 layers fp8" in done.stdout
    done = run("inspect", str(file), "--component", "vae", "--json")
    assert json.loads(done.stdout)["tensors"] == 2
    done = run("inspect", str(file), "--component", "unet", "--json")
    assert done.returncode == 2
    assert "has no component unet" in done.stdout
    output = tmp_path / "vae.safetensors"
    done = run("convert", str(file), "--component", "vae", "-o", str(output))
    assert done.returncode == 0, done.stderr
    assert "vae: 2 tensors, unchanged" in done.stdout
    done = run("convert", str(file), "--component", "vae", "--scheme", "fp8", "-o", "x")
    assert done.returncode == 2
    assert "--scheme: vae of a file is written as it is stored" in done.stderr
