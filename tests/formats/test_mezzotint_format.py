"""Mezzotint's format, rule by rule of docs/formats/mezzotint.md."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import mezzotint
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import BrokenFile, MissingTensor, UnknownFormat
from mezzotint.formats import detect_format, read_header
from support.checkpoint_edits import WEIGHTS, rewrite

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def folder(nvfp4: Path, tmp_path: Path) -> Path:
    mezzotint.convert(nvfp4, tmp_path / "mz")
    return tmp_path / "mz"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Let `change` edit the quantization_config in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def contents(folder: Path) -> Any:
    header = read_header(folder)
    return detect_format(header).format.contents(header)


def test_files(nvfp4: Path, folder: Path, tmp_path: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        WEIGHTS,
        "mezzotint.json",
    ]
    mezzotint.convert(nvfp4, tmp_path / "shards", shard_bytes=400_000)
    names = [f"diffusion_pytorch_model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "shards" / f"{WEIGHTS}.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    for name in names:
        assert (tmp_path / "shards" / name).stat().st_size < 410_000
        with safe_open(tmp_path / "shards" / name, framework="pt") as opened:
            assert all(index["weight_map"][key] == name for key in opened.keys())  # noqa: SIM118


def test_checksums(folder: Path) -> None:
    recorded = json.loads((folder / "mezzotint.json").read_text())["shards"]
    content = (folder / WEIGHTS).read_bytes()
    assert recorded == {
        WEIGHTS: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    }
    (folder / "mezzotint.json").unlink()
    assert len(Checkpoint.open(folder).modules) == 20


def test_equal_conversions_give_equal_bytes(nvfp4: Path, folder: Path, tmp_path: Path) -> None:
    mezzotint.convert(nvfp4, tmp_path / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(format_version=2),
        lambda config: config.pop("format_version"),
        lambda config: config["layout"].update(codes="high_first"),
        lambda config: config["layout"].update(scales="tiles_128x4"),
        lambda config: config.pop("layout"),
    ],
)
def test_another_version_or_layout_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    edit(folder, change)
    with pytest.raises(UnknownFormat, match="format_version"):
        contents(folder)


def test_layers_are_listed_with_scheme_parts_and_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert [list(entry) for entry in config["layers"]] == [["scheme", "parts", "modules"]]
    assert config["layers"][0]["parts"] == [
        "bias",
        "block_scale",
        "codes",
        "global_scale",
        "input_scale",
    ]
    assert config["layers"][0]["modules"]["transformer_blocks.0.ff.net.0.proj"] == [512, 128]
    assert "pieces" not in config


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["layers"][0].update(scheme="nvfp5"),
        lambda config: config["layers"][0]["parts"].remove("global_scale"),
        lambda config: config["layers"][0]["parts"].append("zeros"),
        lambda config: config["layers"][0]["modules"].update(ghost=[16, 16]),
        lambda config: config["layers"][0]["modules"].update({LAYER: [128]}),
        lambda config: config["layers"][0]["modules"].update({LAYER: [128, -128]}),
        lambda config: config.update(layers={}),
        lambda config: config.update(pieces={"a": ["b"]}),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    edit(folder, change)
    with pytest.raises(BrokenFile, match=r"quantization_config of config\.json"):
        contents(folder)


def test_a_layer_that_is_not_listed_is_not_quantized(folder: Path) -> None:
    assert "proj_out" not in contents(folder).linears
    assert "proj_out.weight" in contents(folder).plain


@pytest.mark.parametrize("part", ["weight", "block_scale", "global_scale", "input_scale", "bias"])
def test_a_listed_part_that_is_missing_is_an_error(folder: Path, part: str) -> None:
    rewrite(folder, lambda tensors: tensors.pop(f"{LAYER}.{part}"))
    with pytest.raises(MissingTensor, match=rf"{LAYER}\.{part} is not there"):
        contents(folder).linears[LAYER].check(read_header(folder))


def test_a_module_in_pieces(data: Path, tmp_path: Path) -> None:
    source = data / "nunchaku_flux1_int4_r32/checkpoint"
    mezzotint.convert(source, tmp_path / "mz")
    module = "single_transformer_blocks.0.proj_out"
    config = json.loads((tmp_path / "mz/config.json").read_text())["quantization_config"]
    assert config["pieces"] == {module: [f"{module}.0", f"{module}.1"]}
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "mz")
    assert torch.equal(before.weight(module), after.weight(module))
    assert torch.equal(before.bias(module), after.bias(module))
    assert {
        f"{module}.{i}.{part}" for i in (0, 1) for part in ("weight", "proj_down", "smooth")
    } <= set(load_file(tmp_path / "mz" / WEIGHTS))


def test_nibbles_and_scales_byte_by_byte(nvfp4: Path, tmp_path: Path) -> None:
    def write(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight"][1, 0] = 0x72
        tensors[f"{LAYER}.weight_scale"].view(torch.uint8)[1, 2] = 0x41

    rewrite(nvfp4, write)
    mezzotint.convert(nvfp4, tmp_path / "c", to="comfy")
    mezzotint.convert(tmp_path / "c.safetensors", tmp_path / "mz")
    raw = (tmp_path / "mz" / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    codes, scales = (
        start + header[f"{LAYER}.{part}"]["data_offsets"][0] for part in ("weight", "block_scale")
    )
    assert raw[codes + 64] == 0x72
    assert raw[scales + 8 + 2] == 0x41
    row = Checkpoint.open(tmp_path / "mz").weight(LAYER)[1]
    assert row[1] == 6 * row[0] > 0
