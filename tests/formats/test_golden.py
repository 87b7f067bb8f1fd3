"""Every golden case: valid ones have the golden values, broken ones get their diagnosis."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mezzotint
from conftest import RecordSupport
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import MezzotintError
from mezzotint.families.building import build_meta_model
from mezzotint.loading import LoadReport, Placement, load, plan
from mezzotint.nn import quant_linears
from support.golden_cases import CASES, QWEN, Golden, loaded, of, opened
from support.golden_files import FLOAT, assert_near, expected_modules

each_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: case.path.replace("/checkpoint", "")
)


@each_case
def test_layers_have_diffusers_names_and_the_golden_weights(data: Path, case: Golden) -> None:
    checkpoint, expected = opened(data, case)
    assert checkpoint.modules == sorted(expected_modules(expected))
    for module in checkpoint.modules:
        weight = checkpoint.weight(module)
        rows = expected.get(f"{module}.rows", torch.arange(len(weight)))
        assert_near(weight[rows], expected[f"{module}.dequantized"], case.tolerance, module)


@each_case
def test_layers_have_the_golden_biases(data: Path, case: Golden) -> None:
    """ModelOpt's cases have none; the golden outputs include theirs."""
    checkpoint, expected = opened(data, case)
    for module in checkpoint.modules:
        if f"{module}.bias" in expected:
            bias = checkpoint.bias(module)
            assert bias is not None
            assert_near(bias, expected[f"{module}.bias"].float(), FLOAT, module)


@each_case
def test_loaded_layers_return_the_golden_outputs(
    data: Path, record_support: RecordSupport, case: Golden
) -> None:
    """The tolerance is 2e-6, because the golden outputs were summed in float64."""
    model, report = loaded(data, case)
    expected = load_file(data / case.expected)
    assert set(quant_linears(model)) <= set(expected_modules(expected))
    for name in expected_modules(expected):
        y = model.get_submodule(name)(expected[f"{name}.x"].float())
        assert_near(y, expected[f"{name}.y"], 2e-6, name)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert report.evidence
    for shown in ("golden", "load"):
        record_support(shown, opened(data, case)[0])


def wan(inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value if name == "timestep" else value.float() for name, value in inputs.items()}


def zimage(inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "x": [inputs["x0"].float()],
        "t": inputs["t"].float(),
        "cap_feats": [inputs["cap0"].float()],
    }


@pytest.mark.parametrize(
    ("name", "arguments"), [("modelopt_wan_fp8", wan), ("modelopt_zimage_nvfp4svd", zimage)]
)
def test_whole_models_in_float32_equal_the_golden_ones(
    data: Path, name: str, arguments: Any
) -> None:
    model, _ = loaded(data, of(name))
    with torch.no_grad():
        (output, *_) = model.eval()(
            **arguments(load_file(data / name / "inputs.safetensors")), return_dict=False
        )
    output = output[0] if isinstance(output, list) else output
    expected = load_file(data / name / "outputs.safetensors")["dequantized_weights_fp32"]
    assert_near(output, expected, 1e-5, name)


def reported_by_inspect(data: Path, case: str) -> str:
    report = mezzotint.inspect(data / case)
    return "\n".join((report.evidence, *report.problems, *report.notes))


def reported_by_verify(data: Path, case: str) -> str:
    report = mezzotint.verify(data / case)
    return "\n".join(
        f"{finding.where} {finding.message}" for finding in report.findings if finding.severity
    )


def reported_by_load(data: Path, case: str) -> str:
    report = loaded_as_stored(data / case)
    return "\n".join((report.evidence, *report.events))


def loaded_as_stored(path: Path) -> LoadReport:
    checkpoint = Checkpoint.open(path)
    config = checkpoint.header.config or json.loads((path.parents[1] / QWEN).read_text())
    model = build_meta_model(config["_class_name"], config)
    return load(plan(checkpoint, model), model, Placement(torch.device("cpu")), torch.bfloat16)


INSPECT, VERIFY, LOAD = reported_by_inspect, reported_by_verify, reported_by_load
SINGLE = "single_transformer_blocks.0"
BROKEN = {
    "config_lies_about_algo": r"config\.json declares FP8, and the tensors are NVFP4",
    "duplicate_key_across_shards": (
        r"context_embedder\.bias is stored twice: in .*00001-of.* and in .*00002-of"
    ),
    "header_length_lie": r"says that its header has 1,000,000,000 bytes, and the file has 95,928",
    "malicious_pickle": r"backbone\.pt: asks for posix\.system, .* no code in the file was run",
    "missing_input_scale": rf"{SINGLE}\.norm\.linear\.input_scale is not there",
    "missing_shard": (
        r"00002-of-00002\.safetensors.*(not there|missing)"
        r"|not there: .*00002-of-00002\.safetensors"
    ),
    "missing_weight_scale": rf"{SINGLE}\.attn\.to_q\.weight_scale is not there",
    "nan_scale": rf"{SINGLE}\.attn\.to_q\.weight_scale holds a value that is not finite",
    "nibble_swapped_comfy": (
        r"codes: values alone cannot tell .*; name the BF16 model as a base to be certain"
    ),
    "stale_index_beside_single_file": (
        r"names .*(not there|missing).*,.* diffusion_pytorch_model\.safetensors"
    ),
    "truncated_shard": (
        r"00002-of-00002\.safetensors: is truncated: its header promises 41,988 bytes"
    ),
    "wrong_shape_scale": (
        rf"{SINGLE}\.attn\.to_v\.weight_scale has shape \[32, 1\], expected \[32, 2\]"
    ),
    "zero_size_file": r"the file is empty \(0 bytes\)",
}
"""{case: pattern of the diagnosis that its README.json requires}"""
BLIND = {
    ("nan_scale", INSPECT): "it reads no weights",
    ("nibble_swapped_comfy", VERIFY): "without a base",
}


@pytest.mark.parametrize("diagnose", [INSPECT, VERIFY, LOAD])
@pytest.mark.parametrize("case", BROKEN)
def test_every_broken_case_gets_its_diagnosis(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    diagnose: Callable[[Path, str], str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        found = diagnose(data, f"broken_{case}/checkpoint")
    except MezzotintError as error:
        found = str(error)
    assert bool(re.search(BROKEN[case], found)) == ((case, diagnose) not in BLIND), found
    assert not list(tmp_path.iterdir()), "a payload was run"
    assert not list(data.rglob("GOLDEN_PICKLE_EXECUTED"))


def test_only_what_the_cases_allow_is_loaded(data: Path) -> None:
    """A stale index is an event, and an assumed order of nibbles is evidence; others are errors."""
    runs = []
    for case in BROKEN:
        try:
            loaded_as_stored(data / f"broken_{case}/checkpoint")
        except MezzotintError:
            continue
        outcome = json.loads((data / f"broken_{case}/README.json").read_text())["expected_outcome"]
        assert outcome in ("warn_or_error", "error_or_detect_swap")
        runs.append(case)
    assert runs == ["nibble_swapped_comfy", "stale_index_beside_single_file"]


def test_every_golden_case_is_here(data: Path) -> None:
    folders = {folder.name for folder in data.iterdir() if (folder / "checkpoint").is_dir()}
    broken = {name for name in folders if name.startswith("broken_")}
    assert broken == {f"broken_{case}" for case in BROKEN}
    assert folders - broken == {Path(case.path).parts[0] for case in CASES} - broken
    expected = {str(file.relative_to(data)) for file in data.glob("*/expected*.safetensors")}
    assert expected == {case.expected for case in CASES}
