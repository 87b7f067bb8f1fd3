"""ModelOpt's ranges of unquantized weights, and .pt files that are damaged or hostile."""

import fnmatch
import io
import json
import pickle
import random
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import RecordSupport
from mezzotint.checkpoint import Checkpoint
from mezzotint.containers.torch_zip import CONTAINER
from mezzotint.errors import BrokenFile, CheckpointError, Unsupported
from mezzotint.families import family_by_transformer
from mezzotint.families.building import build_meta_model
from mezzotint.formats.readers.modelopt_calibration import quantize_weight
from mezzotint.loading import Placement, load, plan
from mezzotint.nn import quant_linears
from mezzotint.schemes import FP8
from support.checkpoint_edits import WEIGHTS, load_flux
from support.golden_files import expected_modules
from support.header_fixtures import MODELS, read_fixture

BACKBONE = "modelopt_flux1_fp8/checkpoint/ckpt/backbone.pt"
HF = f"modelopt_flux1_fp8/checkpoint/hf/{WEIGHTS}"
PAYLOAD = "GOLDEN_PICKLE_EXECUTED"


@pytest.fixture
def calibrated(data: Path, tmp_path: Path) -> Path:
    """Return ModelOpt's folder: BF16 weights, a list of ignored layers, and backbone.pt."""
    folder = tmp_path / "export"
    shutil.copytree(data / "base/flux1", folder / "hf")
    shutil.copy((data / HF).parent / "config.json", folder / "hf/config.json")
    (folder / "ckpt").mkdir()
    shutil.copy(data / BACKBONE, folder / "ckpt/backbone.pt")
    return folder


def without_profile(folder: Path) -> None:
    """Remove the model's class, which decides the layers that stay BF16."""
    config = json.loads((folder / "hf/config.json").read_text())
    del config["_class_name"]
    (folder / "hf/config.json").write_text(json.dumps(config))


def test_every_weight_becomes_what_modelopt_itself_exports(
    data: Path, calibrated: Path, record_support: RecordSupport
) -> None:
    without_profile(calibrated)
    checkpoint = Checkpoint.open(calibrated)
    exported = load_file(data / HF)
    expected = load_file(data / "modelopt_flux1_fp8/expected.safetensors")
    assert sorted(checkpoint.contents.linears) == sorted(expected_modules(expected))
    for name, linear in checkpoint.contents.linears.items():
        parts = linear.read(checkpoint.header).parts
        assert torch.equal(
            parts["codes"].view(torch.uint8), exported[f"{name}.weight"].view(torch.uint8)
        ), name
        assert torch.equal(parts["weight_scale"], exported[f"{name}.weight_scale"])
        assert torch.equal(parts["input_scale"], exported[f"{name}.input_scale"])
        assert torch.equal(
            FP8.dequantize(parts)[expected[f"{name}.rows"]], expected[f"{name}.dequantized"]
        )
    record_support("golden", checkpoint)


def test_the_familys_sensitive_layers_stay_bf16(calibrated: Path) -> None:
    checkpoint = Checkpoint.open(calibrated)
    kept = {key for key in checkpoint.contents.ignored if key.endswith("weight_quantizer._amax")}
    assert len(checkpoint.contents.linears) == 13
    assert {key.removesuffix(".weight_quantizer._amax") for key in kept} == {
        "single_transformer_blocks.0.norm.linear",
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.0.ff.net.2",
        "transformer_blocks.0.ff_context.net.0.proj",
        "transformer_blocks.0.ff_context.net.2",
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
    }
    assert set(checkpoint.contents.ignored.values()) == {
        "layers of its kind stay BF16 in a FluxTransformer2DModel"
    }


@pytest.mark.parametrize("model", MODELS)
def test_every_family_has_sensitive_layers(model: str) -> None:
    config = read_fixture(model)["config"]
    linears = {
        name
        for name, module in build_meta_model(config["_class_name"], config).named_modules()
        if is_linear(module)
    }
    for pattern in family_by_transformer(config["_class_name"], "").keep_bf16:
        kept = fnmatch.filter(linears, pattern)
        assert 0 < len(kept) < len(linears) / 2, pattern


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def test_layers_that_modelopt_switched_off_are_not_quantized(data: Path, calibrated: Path) -> None:
    """Their ranges are in backbone.pt nevertheless."""
    described = CONTAINER.read(calibrated / "ckpt/backbone.pt").content["model_state_dict"]
    assert "proj_out.weight_quantizer._amax" in described
    (calibrated / "hf/config.json").write_text((data / "base/flux1/config.json").read_text())
    assert "proj_out" not in Checkpoint.open(calibrated).contents.linears


def test_a_list_of_ignored_layers_is_kept_to(data: Path, tmp_path: Path) -> None:
    tensors = load_file(data / "base/flux1" / WEIGHTS)
    tensors |= {
        f"proj_out.{kind}_quantizer._amax": torch.tensor(1.0) for kind in ("weight", "input")
    }
    tensors |= {
        f"transformer_blocks.0.attn.to_q.{kind}_quantizer._amax": torch.ones(1)
        for kind in ("weight", "input")
    }
    save_file(tensors, tmp_path / WEIGHTS)
    shutil.copy((data / HF).parent / "config.json", tmp_path)
    contents = Checkpoint.open(tmp_path).contents
    assert list(contents.linears) == ["transformer_blocks.0.attn.to_q"]
    assert contents.ignored["proj_out.weight_quantizer._amax"].startswith(
        "the configuration ignores its layer"
    )


def test_ranges_may_come_from_a_file_that_is_named(data: Path, calibrated: Path) -> None:
    named = Checkpoint.open(data / "base/flux1", scales_from=data / BACKBONE)
    found = Checkpoint.open(calibrated)
    assert named.contents.linears == found.contents.linears
    assert named.detected.format.name == "modelopt_calibration"
    assert (
        "13 layers are quantized as they are read, 7 with ranges stay unquantized" in named.evidence
    )


def test_the_model_runs(calibrated: Path) -> None:
    checkpoint = Checkpoint.open(calibrated)
    model = build_meta_model("FluxTransformer2DModel", checkpoint.header.config)
    load(plan(checkpoint, model), model, Placement(torch.device("cpu")), torch.bfloat16)
    assert len(quant_linears(model)) == 13


def test_quantized_weights_need_no_ranges(data: Path) -> None:
    checkpoint = Checkpoint.open(data / "modelopt_flux1_fp8/checkpoint")
    assert checkpoint.detected.format.name == "modelopt"
    assert checkpoint.header.notes[0].startswith("nothing is taken from")


def test_only_modelopts_rounding_gives_modelopts_codes() -> None:
    """Without rounding to BF16 first, about one code in a hundred differs."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = weight.abs().amax().float() / 448
    straight = (weight.float() / scale).to(torch.float8_e4m3fn)
    assert 0 < (quantize_weight(weight, scale).float() != straight.float()).float().mean() < 0.05


def test_ranges_for_another_format_are_refused(calibrated: Path) -> None:
    def for_nvfp4(program: bytes) -> bytes:
        return program.replace(b"K\x04K\x03\x86", b"K\x02K\x01\x86")

    repack(calibrated / "ckpt/backbone.pt", for_nvfp4)
    with pytest.raises(
        Unsupported, match=r"weight_quantizer is not calibrated for FP8, its num_bits is \(2, 1\)"
    ):
        Checkpoint.open(calibrated)


def repack(file: Path, change: Any) -> None:
    """Write the archive again with another data.pkl."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("/data.pkl") else content)


def archived(file: Path, program: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    return file


def test_a_payload_is_refused_and_not_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        BrokenFile,
        match=r"asks for posix\.system, which no tensor needs; no code in the file was run",
    ):
        Checkpoint.open(data / "broken_malicious_pickle/checkpoint")
    assert not (tmp_path / PAYLOAD).exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\neval\n.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        b"(iposix\nsystem\n.",
        b"ctorch.storage\n_load_from_bytes\n.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}b.",
        b"ccollections\nOrderedDict\n}b.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"ctorch\nbfloat16\n)R.",
        b"}(K\x01)tR.",
        b"X\x01\x00\x00\x00aQ.",
        b"}))s.",
        b"\x82\x01.",
    ],
)
def test_whatever_is_not_a_description_of_tensors_is_refused(
    tmp_path: Path, program: bytes
) -> None:
    with pytest.raises(BrokenFile):
        CONTAINER.read(archived(tmp_path / "a.pt", program))


@pytest.mark.timeout(5)
def test_a_pickle_that_would_take_forever_is_refused_at_once(tmp_path: Path) -> None:
    nested = (
        b"\x80\x02)q\x00"
        + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(100))
        + b"}hdNs."
    )
    with pytest.raises(BrokenFile, match="dictionary key that is a tuple"):
        CONTAINER.read(archived(tmp_path / "a.pt", nested))


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\x7fa.",
        b"\x8e" + b"\xff" * 7 + b"\x00a.",
    ],
)
def test_a_false_length_reserves_no_memory(tmp_path: Path, program: bytes) -> None:
    file = archived(tmp_path / "a.pt", program)
    with suppress(BrokenFile):
        assert CONTAINER.read(file).content is None


def test_what_torch_saves_is_read_back(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    saved = {
        "a": shared[4:8].reshape(2, 2),
        "b": torch.nn.Parameter(torch.ones(3).bfloat16()),
        "n": [1, (2, None)],
    }
    torch.save(saved, tmp_path / "a.pt")
    file = CONTAINER.read(tmp_path / "a.pt")
    assert torch.equal(file.tensors["a"].read(), saved["a"])
    assert torch.equal(file.tensors["b"].read(), saved["b"].detach())
    assert file.content["n"] == [1, (2, None)]


def test_a_view_that_is_not_contiguous_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(6.0).reshape(2, 3).t()}, tmp_path / "a.pt")
    file = CONTAINER.read(tmp_path / "a.pt")
    with pytest.raises(BrokenFile, match=r"strides \(1, 3\)"):
        file.tensors["a"]


def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(6.0)}, tmp_path / "a.pt")
    repack(tmp_path / "a.pt", lambda program: program.replace(b"K\x00K\x06\x85", b"K\x01K\x06\x85"))
    file = CONTAINER.read(tmp_path / "a.pt")
    with pytest.raises(BrokenFile, match="a ends at byte 28 of a storage that has 24"):
        file.tensors["a"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(BrokenFile, match=r"is not a file of torch\.save"):
        CONTAINER.read(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N." * 100)
    with pytest.raises(BrokenFile, match="compressed entries"):
        CONTAINER.read(tmp_path / "b.pt")


def test_damaged_files_are_refused_or_read_but_never_anything_else(
    data: Path, tmp_path: Path
) -> None:
    whole = (data / "broken_malicious_pickle/checkpoint/ckpt/backbone.pt").read_bytes()
    chance = random.Random(0)  # noqa: S311
    file = tmp_path / "a.pt"
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        file.write_bytes(
            damaged[: chance.randint(1, len(damaged))] if chance.random() < 0.2 else damaged
        )
        with suppress(CheckpointError):
            CONTAINER.read(file)


def test_random_programs_never_get_further_than_an_error(tmp_path: Path) -> None:
    saved = io.BytesIO()
    torch.save({"a": torch.ones(2)}, saved)
    with zipfile.ZipFile(saved) as archive:
        program = archive.read(
            next(name for name in archive.namelist() if name.endswith("data.pkl"))
        )
    chance = random.Random(1)  # noqa: S311
    for _ in range(500):
        damaged = bytearray(program)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        with suppress(CheckpointError):
            CONTAINER.read(archived(tmp_path / "a.pt", bytes(damaged)))


def test_the_base_of_the_cases_loads_without_ranges(data: Path) -> None:
    assert not quant_linears(load_flux(data / "base/flux1"))
