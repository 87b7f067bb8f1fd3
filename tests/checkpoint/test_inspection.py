"""`mezzotint.open` and `inspect`: components, backends per GPU, and how fast the answer comes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mezzotint
from mezzotint.cli.inspection_tables import print_report
from mezzotint.containers import TensorInfo
from mezzotint.errors import NotACheckpoint
from mezzotint.inspection import DeviceEstimate
from mezzotint.kernels import requirements
from mezzotint.kernels.optional_library import OptionalLibrary
from support import sparse_checkpoints as sparse
from support.golden_cases import CASES, Golden, loaded, opened
from support.modelopt_exporter import export
from support.pipeline_cases import Case

DEV = "bfl_flux2dev_nvfp4/checkpoint/flux2-dev-nvfp4"
BEYOND = {"modelopt_wan_fp8": 0.10, "nunchaku": 0.05, "": 0.001}
"""Share of the loaded bytes that the prediction omits.

These are float32 layers, repeated proj_down and repeated scales, which tiny models have many of.
"""


def on(outlooks: tuple[DeviceEstimate, ...], target: str) -> DeviceEstimate:
    (outlook,) = [outlook for outlook in outlooks if outlook.target == target]
    return outlook


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.path.replace("/checkpoint", ""))
def test_the_predicted_memory_is_what_is_resident_when_loaded(data: Path, case: Golden) -> None:
    _, report = loaded(data, case, torch.bfloat16)
    resident = sum(report.resident_bytes.values())
    predicted = on(opened(data, case)[0].report.devices, "cpu").resident_bytes
    beyond = next(share for name, share in BEYOND.items() if name in case.path)
    assert resident * (1 - beyond) <= predicted <= resident * 1.001


def test_each_generation_has_its_backend_and_its_reasons(data: Path) -> None:
    outlooks = mezzotint.inspect(data / "modelopt_flux1_fp8/checkpoint/hf").devices
    assert [outlook.target for outlook in outlooks][:8] == [
        "cpu",
        "sm_75",
        "sm_80",
        "sm_86",
        "sm_89",
        "sm_90",
        "sm_100",
        "sm_120",
    ]
    (use,) = on(outlooks, "sm_80").backends
    assert (use.scheme, use.layers) == ("fp8", 20)
    assert use.declined["scaled_mm"] == "needs FP8 tensor cores (sm_89 or newer), this is sm_80"
    assert {use.backend for use in on(outlooks, "sm_90").backends} == {"scaled_mm"}
    assert sum(outlook.is_this_machine for outlook in outlooks) == 1


def test_outlooks_are_about_the_gpu_and_not_about_this_machine(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch installs Triton with a GPU; without it here, an H100 still selects dequant_fp8."""
    whole = mezzotint.inspect(data / "modelopt_flux1_nvfp4/checkpoint").devices
    monkeypatch.setattr(requirements, "find_spec", lambda _name: None)
    monkeypatch.setattr(
        OptionalLibrary, "unavailable_reason", lambda library: f"needs {library.distribution}"
    )
    outlooks = mezzotint.inspect(data / "modelopt_flux1_nvfp4/checkpoint").devices
    (use,) = on(outlooks, "sm_90").backends
    assert (use.backend, use.verified, use.libraries) == (
        "dequant_fp8",
        True,
        {"dequant_fp8": "triton"},
    )
    assert on(outlooks, "sm_90").resident_bytes == on(whole, "sm_90").resident_bytes
    print_report(mezzotint.inspect(data / "modelopt_flux1_nvfp4/checkpoint"), layers=False)
    text = capsys.readouterr().out
    assert "20 nvfp4 on dequant_fp8 (needs triton, not installed here)" in text
    assert (
        "20 nvfp4 on dequant_fp8 (not verified on hardware; needs triton, not installed here)"
        in text
    )
    assert (
        "20 nvfp4 on dequantize (not verified on hardware; humming with humming-kernels installed; "
        "needs triton, not installed here)" in text
    )


def test_a_component_is_picked_from_a_pipeline(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases("wan_a14b")
    assert mezzotint.open(case.folder).header.path == case.folder / "transformer"
    second = mezzotint.open(case.folder, component="transformer_2")
    assert second.header.path == case.folder / "transformer_2"
    with pytest.raises(NotACheckpoint, match="has no component transformer_3"):
        mezzotint.open(case.folder, component="transformer_3")
    exported = export(
        case.reference.transformer_2, case.largest["transformer_2"], "fp8", tmp_path / "low"
    )
    report = mezzotint.verify(exported, case.folder, component=None)
    assert max(layer.relative_error for layer in report.layers) > 1, "held against the other expert"


def test_input_scales_of_a_sister_are_taken_everywhere(data: Path, tmp_path: Path) -> None:
    mixed, full = data / f"{DEV}-mixed.safetensors", data / f"{DEV}.safetensors"
    assert mezzotint.open(mixed).report.notes == ()
    note = f"2 input scales are taken from {full}"
    assert mezzotint.inspect(mixed, scales_from=full).notes == (note,)
    assert mezzotint.verify(mixed, scales_from=full).exit_code == mezzotint.verify(mixed).exit_code
    assert mezzotint.convert(mixed, tmp_path / "mz", scales_from=full).notes[0] == note


def test_the_report_is_one_json_object(data: Path) -> None:
    checkpoint = mezzotint.open(data / f"{DEV}.safetensors")
    entries = json.loads(json.dumps(checkpoint.report.to_dict()))
    assert entries["path"] == str(checkpoint.header.path)
    assert entries["family"] == checkpoint.family.title == "FLUX.2"
    assert len(entries["layers"]) == len(checkpoint.contents.linears)
    assert {name.split(".")[0] for name in checkpoint.modules} == {
        "transformer_blocks",
        "single_transformer_blocks",
    }


@pytest.mark.parametrize("name", sparse.FORMATS)
def test_a_full_size_checkpoint_is_inspected_from_few_bytes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """At most a few rows are read; "plain" has 64 GB. benchmarks/ has the seconds."""
    folder = sparse.FORMATS[name](tmp_path / "full", data)
    read: list[int] = []
    whole = TensorInfo.read
    monkeypatch.setattr(TensorInfo, "read", lambda info: read.append(info.nbytes) or whole(info))
    report = mezzotint.inspect(folder)
    if name not in sparse.WIDENED:
        assert report.problems == ()
    assert report.stored_bytes > (64e9 if name == "plain" else 7e9)
    assert sum(read) < 150e6
