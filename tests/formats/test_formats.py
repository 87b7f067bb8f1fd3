"""Detection: the format of a file, its evidence, and files that are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mezzotint.errors import MissingTensor, UnknownFormat
from mezzotint.formats import detect_format, formats, read_header
from mezzotint.tensor import PLAIN, Layout
from support.checkpoint_edits import WEIGHTS, rewrite


def test_formats_are_discovered() -> None:
    assert list(formats()) == [
        "bfl",
        "bitsandbytes",
        "block_scales",
        "comfy",
        "compressed_tensors",
        "fp8_cast",
        "gguf",
        "gptq_awq",
        "lightx2v",
        "mezzotint",
        "modelopt",
        "modelopt_calibration",
        "nunchaku",
        "nunchaku_lite",
        "plain",
        "quanto",
        "row_major",
        "sdnq",
        "torchao",
    ]


@pytest.mark.parametrize(
    ("path", "name", "evidence"),
    [
        ("base/flux1", "plain", "tensors are BF16"),
        ("modelopt_flux1_fp8/checkpoint/hf", "modelopt", "quant_algo FP8, by modelopt 0.47.0"),
        ("modelopt_flux1_nvfp4/checkpoint", "modelopt", "quant_algo NVFP4, by modelopt 0.47.0"),
    ],
)
def test_golden_files_are_detected(data: Path, path: str, name: str, evidence: str) -> None:
    found = detect_format(read_header(data / path))
    assert found.format.name == name
    assert evidence in found.evidence
    assert set(found.declined) == set(formats()) - {name}


def test_modelopts_comfy_file_differs_from_comfyuis(data: Path) -> None:
    file = data / "modelopt_flux1_nvfp4_comfyfile/checkpoint" / WEIGHTS
    found = detect_format(read_header(file))
    layouts = {
        linear.layout for linear in found.format.contents(read_header(file)).linears.values()
    }
    assert layouts == {Layout("low_first", "tiles_128x4")}
    assert "written by ModelOpt" in found.evidence


def test_the_tensors_decide_what_is_quantized(nvfp4: Path) -> None:
    contents = detect_format(read_header(nvfp4)).format.contents(read_header(nvfp4))
    assert len(contents.linears) == 20
    assert {linear.layout for linear in contents.linears.values()} == {PLAIN}
    assert "proj_out.weight" in contents.plain


def test_config_that_contradicts_the_tensors_names_both(data: Path) -> None:
    header = read_header(data / "broken_config_lies_about_algo/checkpoint")
    with pytest.raises(UnknownFormat, match="declares FP8, and the tensors are NVFP4"):
        detect_format(header).format.contents(header)


def test_a_file_that_nothing_detects_lists_every_reason(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(UnknownFormat) as caught:
        detect_format(read_header(tmp_path / "a.safetensors"))
    assert all(f"{name}: no, " in caught.value.message for name in formats())


def test_a_comfy_marker_without_its_weight_is_an_error(data: Path, tmp_path: Path) -> None:
    tensors = load_file(data / "modelopt_flux1_nvfp4_comfyfile/checkpoint" / WEIGHTS)
    marker = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    save_file(tensors | {"ghost.comfy_quant": marker}, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    with pytest.raises(MissingTensor, match=r"ghost\.weight"):
        detect_format(header).format.contents(header)


def test_calibration_state_is_ignored_with_its_reason(fp8: Path) -> None:
    key = "transformer_blocks.0.attn.to_q.input_quantizer._amax"
    rewrite(fp8, lambda tensors: tensors.update({key: torch.ones(1)}))
    header = read_header(fp8)
    assert detect_format(header).format.contents(header).ignored == {
        key: "state of a calibration quantizer"
    }
