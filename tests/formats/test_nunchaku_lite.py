"""Nunchaku Lite: Nunchaku's golden layers under diffusers' names, without what Nunchaku adds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mezzotint
from conftest import RecordSupport
from mezzotint import layouts
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import CheckpointError, MissingTensor, UnknownFormat, UnreadFormat
from mezzotint.families.building import build_meta_model
from mezzotint.formats.readers.svdquant import NUNCHAKU_LAYOUT, V2
from mezzotint.loading import Placement, load, plan
from mezzotint.schemes import AWQ_W4A16, SVDQUANT_INT4
from mezzotint.tensor import PLAIN, QuantTensor
from support.flux_inputs import flux_inputs
from support.nunchaku_files import golden

CASES = ("nunchaku_flux1_int4_r32", "nunchaku_flux1_nvfp4_r32")
WEIGHTS = "diffusion_pytorch_model.safetensors"
QUERY, OUT = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2"
each_case = pytest.mark.parametrize("case", CASES)
Sections = dict[str, dict[str, Any]]


def layer(piece: QuantTensor) -> QuantTensor:
    """Return a layer as diffuse-compressor converts Nunchaku's: the bias has the shift."""
    parts = dict(piece.parts)
    if "shift" in parts:
        parts["bias"] = piece.scheme.dequantize_bias(parts)
        del parts["shift"]
    parts["bias"] = parts["bias"].bfloat16()
    return QuantTensor(piece.scheme, PLAIN, piece.shape, parts)


def layers_of(source: Checkpoint) -> dict[str, QuantTensor]:
    """Return the layers of a Nunchaku file that are no part of a split one."""
    pieces = {module: source.read(module) for module in source.modules}
    return {module: layer(read[0]) for module, read in pieces.items() if len(read) == 1}


def saved(folder: Path, source: Checkpoint, declare: Callable[[Sections], Any]) -> Path:
    """Write a folder of Nunchaku Lite; split layers become BF16."""
    layers = layers_of(source)
    tensors = {name: source.tensor(name) for name in source.plain}
    sections: Sections = {}
    for module in source.modules:
        if module not in layers:
            tensors[f"{module}.weight"] = source.weight(module).bfloat16()
            tensors[f"{module}.bias"] = source.bias(module).bfloat16()
            continue
        scheme = layers[module].scheme
        stored = layouts.convert(layers[module], NUNCHAKU_LAYOUT[scheme.name])
        tensors |= {module + V2[part]: value for part, value in stored.parts.items()}
        precision = "nvfp4" if "nvfp4" in scheme.name else "int4"
        section = "awq_w4a16" if scheme is AWQ_W4A16 else "svdq_w4a4"
        said = sections.setdefault(section, {"precision": precision, "targets": []})
        said["targets"].append(module)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: v.contiguous() for name, v in tensors.items()}, folder / WEIGHTS)
    config = dict(source.header.config) | {"quantization_config": declare(sections)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def declared(sections: Sections) -> dict[str, Any]:
    return {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16"} | sections


@each_case
def test_layers_decode_as_nunchakus_do(
    data: Path, tmp_path: Path, record_support: RecordSupport, case: str
) -> None:
    """Layers that Nunchaku does not fuse have its very bytes."""
    source = Checkpoint.open(golden(data, case))
    checkpoint = Checkpoint.open(saved(tmp_path, source, declared))
    assert checkpoint.detected.format.name == "nunchaku_lite"
    assert set(checkpoint.modules) == set(layers_of(source))
    for module in checkpoint.modules:
        assert torch.equal(checkpoint.weight(module), source.weight(module))
    stored = load_file(golden(data, case))["transformer_blocks.0.mlp_fc1.qweight"]
    name = "transformer_blocks.0.ff.net.0.proj.qweight"
    assert torch.equal(load_file(tmp_path / WEIGHTS)[name], stored)
    record_support("golden", checkpoint)


def test_no_input_is_shifted_and_no_bias_is_changed(data: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(golden(data, CASES[0]))
    checkpoint = Checkpoint.open(saved(tmp_path, source, declared))
    (piece,) = checkpoint.read(OUT)
    assert piece.scheme is SVDQUANT_INT4
    assert "shift" not in piece.parts
    for module, expected in layers_of(source).items():
        assert torch.equal(checkpoint.bias(module), expected.parts["bias"].float())


@each_case
def test_a_loaded_model_equals_the_dequantized_one(
    data: Path, tmp_path: Path, record_support: RecordSupport, case: str
) -> None:
    folder = saved(tmp_path, Checkpoint.open(golden(data, case)), declared)
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.header.config
    model, plain = (build_meta_model(config["_class_name"], config) for _ in range(2))
    load(plan(checkpoint, model, "bf16"), model, Placement(torch.device("cpu")), torch.float32)
    state = {name: checkpoint.tensor(name).float() for name in checkpoint.plain}
    for module in checkpoint.modules:
        state |= {f"{module}.weight": checkpoint.weight(module)}
        state |= {f"{module}.bias": checkpoint.bias(module)}
    plain.load_state_dict(state, assign=True)
    with torch.no_grad():
        ours, theirs = (m.eval()(**flux_inputs(), return_dict=False)[0] for m in (model, plain))
    assert torch.linalg.norm(ours - theirs) <= 1e-5 * torch.linalg.norm(theirs)
    record_support("load", checkpoint)


@each_case
def test_verify_and_convert_read_the_file(
    data: Path, tmp_path: Path, record_support: RecordSupport, case: str
) -> None:
    folder = saved(tmp_path / "in", Checkpoint.open(golden(data, case)), declared)
    report = mezzotint.verify(folder)
    assert report.exit_code == 0, report.findings
    mezzotint.convert(folder, tmp_path / "own")
    checkpoint, own = Checkpoint.open(folder), Checkpoint.open(tmp_path / "own")
    assert own.modules == checkpoint.modules
    for module in checkpoint.modules:
        assert torch.equal(own.weight(module), checkpoint.weight(module))
    record_support("convert", checkpoint)


def manifest(sections: Sections, **more: Any) -> dict[str, str]:
    """Return the metadata of diffuse-compressor's file for these layers."""
    targets = [
        {"nunchaku_op": op, "checkpoint_prefix": module, "source_modules": [module]}
        | {"precision": said["precision"].replace("nvfp4", "fp4")}
        for op, said in sections.items()
        for module in said["targets"]
    ]
    found = {"schema": "nunchaku_lite.runtime_manifest", "version": 1, "targets": targets} | more
    return {"quantization_config": json.dumps({"runtime_manifest": found})}


def as_single_file(folder: Path, to: Path, **more: Any) -> Path:
    """Write the weights of a folder as one file with a manifest."""
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("quantization_config")
    sections = {key: said[key] for key in ("svdq_w4a4", "awq_w4a16") if key in said}
    metadata = manifest(sections, **more) | {"config": json.dumps(config)}
    save_file(load_file(folder / WEIGHTS), to, metadata)
    return to


@each_case
def test_a_single_file_declares_its_layers_in_the_header(
    data: Path, tmp_path: Path, case: str
) -> None:
    folder = saved(tmp_path / "in", Checkpoint.open(golden(data, case)), declared)
    alone = Checkpoint.open(as_single_file(folder, tmp_path / "a.safetensors"))
    assert alone.detected.format.name == "nunchaku_lite"
    assert torch.equal(alone.weight(QUERY), Checkpoint.open(folder).weight(QUERY))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"structural_patches": [{"op": "split"}]}, "changes the structure"),
        (
            {
                "targets": [
                    {"nunchaku_op": "svdq_w4a4", "precision": "int4", "checkpoint_prefix": "x"}
                    | {"source_modules": ["a", "b"]}
                ]
            },
            "fuses",
        ),
    ],
)
def test_manifests_that_change_the_model_are_refused(
    data: Path, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    folder = saved(tmp_path / "in", Checkpoint.open(golden(data, CASES[0])), declared)
    with pytest.raises(UnreadFormat, match=said):
        Checkpoint.open(as_single_file(folder, tmp_path / "a.safetensors", **more))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda s: s["svdq_w4a4"]["targets"].append("a.b"), MissingTensor, r"a\.b\.qweight is not"),
        (lambda s: s["svdq_w4a4"]["targets"].pop(), UnknownFormat, "does not list it"),
        (lambda s: s["svdq_w4a4"].update(precision="nvfp4"), UnknownFormat, "SVDQuant INT4"),
    ],
)
def test_layers_and_declaration_agree(
    data: Path,
    tmp_path: Path,
    change: Callable[[Sections], Any],
    error: type[CheckpointError],
    said: str,
) -> None:
    def changed(sections: Sections) -> dict[str, Any]:
        change(sections)
        return declared(sections)

    folder = saved(tmp_path, Checkpoint.open(golden(data, CASES[0])), changed)
    with pytest.raises(error, match=said):
        Checkpoint.open(folder)


def test_unfused_layers_are_not_nunchakus_own(data: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path, Checkpoint.open(golden(data, CASES[0])), declared)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnreadFormat, match="as in Nunchaku Lite"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("suffix", ["wscales", "proj_down", "proj_up", "smooth_factor", "bias"])
def test_every_tensor_of_a_layer_is_needed(data: Path, tmp_path: Path, suffix: str) -> None:
    folder = saved(tmp_path, Checkpoint.open(golden(data, CASES[0])), declared)
    tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    del tensors[f"{QUERY}.{suffix}"]
    save_file(tensors, folder / WEIGHTS)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError):
        plan(checkpoint, checkpoint.model())
