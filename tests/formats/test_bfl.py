"""Black Forest Labs' files: golden values, scalars of both shapes, missing input scales."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import BadRequest, MissingTensor, NotACheckpoint, UnknownFormat
from mezzotint.families.building import build_meta_model
from mezzotint.formats import Header, detect_format, read_header
from mezzotint.layouts.tiles import padded_shape
from mezzotint.loading import plan, report
from mezzotint.tensor import Layout
from support.checkpoint_edits import edited
from support.golden_files import FLUX2_DEV, opened, plain_parts
from support.header_fixtures import expand, header_of, read_fixture

FULL = "bfl_flux2dev_nvfp4/checkpoint/flux2-dev-nvfp4.safetensors"
MIXED = "bfl_flux2dev_nvfp4/checkpoint/flux2-dev-nvfp4-mixed.safetensors"
KLEIN = "bfl_flux2klein_fp8/checkpoint/flux-2-klein-4b-fp8.safetensors"


@pytest.mark.parametrize("file", [FULL, MIXED, KLEIN])
def test_bfl_files_are_detected_by_their_names_and_tensors(data: Path, file: str) -> None:
    found = detect_format(read_header(data / file))
    assert found.format.name == "bfl"
    assert "Black Forest Labs' names, and" in found.evidence


@pytest.mark.parametrize(
    ("metadata", "evidence"),
    [(None, "of the header's metadata, not verified"), ({}, "assumed from the names alone")],
)
def test_layout_is_the_same_with_and_without_metadata(
    data: Path, tmp_path: Path, metadata: dict[str, str] | None, evidence: str
) -> None:
    file = edited(data / FULL, tmp_path / "a.safetensors", lambda tensors: None, metadata)
    contents = opened(file)[1]
    assert {linear.layout for linear in contents.linears.values()} == {
        Layout("high_first", "tiles_128x4")
    }
    assert evidence in contents.evidence[0]


def test_quantized_layers_without_an_input_scale_find_one_at_each_call(data: Path) -> None:
    contents = opened(data / MIXED)[1]
    missing = sorted(
        name for name, linear in contents.linears.items() if "input_scale" not in linear.keys
    )
    assert missing == ["double_blocks.0.txt_mlp.0", "double_blocks.0.txt_mlp.2"]
    weights = plain_parts(data / MIXED)
    assert all(weight.quantizes_activation for weight in weights.values())
    weight = weights[missing[0]]
    x = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(3))
    scale = {"input_scale": x.abs().amax() / 2688}
    dynamic = weight.scheme.linear(x, weight.parts, quantize=True)
    assert torch.equal(dynamic, weight.scheme.linear(x, {**weight.parts, **scale}, quantize=True))


def test_a_missing_input_scale_is_an_event(data: Path) -> None:
    def events(checkpoint: Checkpoint) -> tuple[str, ...]:
        return report(plan(checkpoint, model), model).events

    model = build_meta_model(FLUX2_DEV["_class_name"], FLUX2_DEV)
    dynamic = "2 quantized layers have no input scale in the file; theirs is computed at each call"
    assert dynamic in events(Checkpoint.open(data / MIXED))
    supplied = events(Checkpoint.open(data / MIXED, scales_from=data / FULL))
    assert not any("no input scale" in event for event in supplied)
    assert any(event.startswith("2 input scales are taken from") for event in supplied)


def test_an_input_scale_that_nothing_uses_is_ignored_with_its_reason(data: Path) -> None:
    ignored = opened(data / MIXED)[1].ignored
    assert ignored == {
        "single_blocks.0.linear2.input_scale": "input scale of a layer that is not quantized"
    }


def test_a_weight_scale_that_is_missing_is_never_one(data: Path, tmp_path: Path) -> None:
    key = "double_blocks.0.img_mlp.0.weight_scale_2"
    file = edited(data / FULL, tmp_path / "a.safetensors", lambda tensors: tensors.pop(key))
    with pytest.raises(MissingTensor, match=r"img_mlp\.0\.weight_scale_2 is not there"):
        plain_parts(file)


def test_metadata_that_contradicts_the_tensors_names_both(data: Path, tmp_path: Path) -> None:
    name = "double_blocks.0.img_mlp.0"
    weight = torch.zeros(768, 128, dtype=torch.bfloat16)
    file = edited(
        data / FULL,
        tmp_path / "a.safetensors",
        lambda tensors: tensors.update({f"{name}.weight": weight}),
    )
    with pytest.raises(
        UnknownFormat, match=r"says that double_blocks\.0\.img_mlp\.0 is nvfp4, .* not quantized"
    ):
        opened(file)


def test_a_folder_with_both_files_asks_for_one(data: Path, tmp_path: Path) -> None:
    shutil.copytree((data / FULL).parent, tmp_path / "both")
    with pytest.raises(NotACheckpoint, match="2 weight files"):
        read_header(tmp_path / "both")


def test_missing_input_scales_may_come_from_the_full_file(data: Path) -> None:
    checkpoint = Checkpoint.open(data / MIXED, scales_from=data / FULL)
    full = plain_parts(data / FULL)
    for name, linear in checkpoint.contents.linears.items():
        if "txt_mlp" in name:
            assert torch.equal(
                linear.read(checkpoint.header).parts["input_scale"], full[name].parts["input_scale"]
            )
    assert checkpoint.header.notes == (f"2 input scales are taken from {data / FULL}",)


def test_scales_of_other_weights_are_refused(data: Path, tmp_path: Path) -> None:
    key = "double_blocks.0.txt_mlp.0.weight_scale_2"
    different = edited(
        data / FULL,
        tmp_path / "a.safetensors",
        lambda tensors: tensors.update({key: torch.tensor(0.5)}),
    )
    with pytest.raises(BadRequest, match=r"txt_mlp\.0\.weight_scale_2 is .* in "):
        Checkpoint.open(data / MIXED, scales_from=different)


def test_a_file_without_the_missing_scales_is_refused(data: Path) -> None:
    with pytest.raises(BadRequest, match="has no input scale that"):
        Checkpoint.open(data / MIXED, scales_from=data / KLEIN)


BLOCK_LINEAR = re.compile(
    r"(double|single)_blocks\.\d+\.(.*(qkv|proj|mlp\.[02]|linear[12]))\.weight$"
)


def quantized_header(model: str, scheme: str) -> Header:
    """Return the header of a full-size file with the linears of blocks quantized."""
    fixture = read_fixture(model)
    plain = header_of(expand(fixture["original"]), fixture["config"])
    tensors = {}
    for name, info in plain.tensors.items():
        if not BLOCK_LINEAR.match(name):
            tensors[name] = info
            continue
        rows, columns = info.shape
        scalar = replace(info, dtype=torch.float32, shape=())
        if scheme == "fp8":
            new = {"": replace(info, dtype=torch.float8_e4m3fn), "_scale": scalar}
        else:
            tiles = replace(
                info, dtype=torch.float8_e4m3fn, shape=padded_shape(rows, columns // 16)
            )
            new = {
                "": replace(info, dtype=torch.uint8, shape=(rows, columns // 2)),
                "_scale": tiles,
                "_scale_2": scalar,
            }
        tensors |= {
            name + suffix: replace(part, name=name + suffix) for suffix, part in new.items()
        }
        tensors[name.removesuffix("weight") + "input_scale"] = replace(scalar, shape=(1,))
    return replace(plain, tensors=tensors)


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4"])
@pytest.mark.parametrize(
    ("model", "linears"),
    [
        ("flux1-dev", 19 * 12 + 38 * 5),
        ("flux2-dev", 8 * 12 + 48 * 2),
        ("flux2-klein-4b", 5 * 12 + 20 * 2),
        ("flux2-klein-9b", 8 * 12 + 24 * 2),
    ],
)
def test_at_full_size_every_quantized_row_has_its_place(
    model: str, linears: int, scheme: str
) -> None:
    checkpoint = Checkpoint.of(quantized_header(model, scheme))
    config = read_fixture(model)["config"]
    plan(checkpoint, build_meta_model(config["_class_name"], config))
    assert checkpoint.detected.format.name == "bfl"
    assert len(checkpoint.modules) == linears
