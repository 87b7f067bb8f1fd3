"""Files of quantization tools through every door, each against the values of the tool itself.

tests/data/TOOL/make.py wrote the files with the tool; see `support.tool_goldens`.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mezzotint
from conftest import RecordSupport
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import CheckpointError
from mezzotint.formats import detect_format, read_header
from support import tool_goldens as goldens

TOOLS = {
    "bitsandbytes": "bitsandbytes",
    "block_scales": "block_scales",
    "compressed_tensors": "compressed_tensors",
    "convert_to_quant": "comfy",
    "gptq_awq": "gptq_awq",
    "quanto": "quanto",
    "sdnq": "sdnq",
    "torchao": "torchao",
}
"""{folder of a tool's files: the format that reads them}"""
UNUSED = (".input_scale", ".output_scale")
"""Tensors that quanto always stores, and that are 1.0 unless activations are quantized."""
each_tool = pytest.mark.parametrize("tool", TOOLS)


@each_tool
def test_single_layers_decode_to_the_tools_bits(data: Path, tool: str) -> None:
    found = goldens.decoded_layers(data / tool / "layers")
    goldens.assert_fingerprints(data / tool / "layers.json", found)


@each_tool
def test_a_model_decodes_to_the_tools_bits(
    data: Path, record_support: RecordSupport, tool: str
) -> None:
    checkpoint = Checkpoint.open(data / tool / "model")
    assert checkpoint.detected.format.name == TOOLS[tool]
    assert checkpoint.report.problems == ()
    found = {module: checkpoint.weight(module) for module in checkpoint.modules}
    goldens.assert_fingerprints(data / tool / "model.json", found)
    record_support("golden", checkpoint)


@each_tool
def test_a_loaded_model_equals_the_dequantized_one(
    data: Path, record_support: RecordSupport, tool: str
) -> None:
    checkpoint = Checkpoint.open(data / tool / "model")
    loaded = goldens.loaded_model(data / tool / "model")
    goldens.assert_same_outputs(loaded, goldens.dequantized_model(checkpoint))
    record_support("load", checkpoint)


@each_tool
def test_a_file_of_a_tool_is_sound(data: Path, tool: str) -> None:
    report = mezzotint.verify(data / tool / "model")
    assert report.exit_code == 0, report.findings


@each_tool
def test_conversions_keep_the_tools_values(
    data: Path, tmp_path: Path, record_support: RecordSupport, tool: str
) -> None:
    source = Checkpoint.open(data / tool / "model")
    report = mezzotint.convert(data / tool / "model", tmp_path / "own")
    assert not report.transforms
    own = Checkpoint.open(tmp_path / "own")
    assert own.modules == source.modules
    mezzotint.convert(data / tool / "model", tmp_path / "bf16", to="bf16")
    plain = load_file(next((tmp_path / "bf16").glob("*.safetensors")))
    for module in source.modules:
        weight = source.weight(module)
        assert torch.equal(own.weight(module), weight)
        assert torch.equal(plain[f"{module}.weight"], weight.bfloat16())
    record_support("convert", source)


@each_tool
def test_packed_codes_stay_packed_in_memory(data: Path, tool: str) -> None:
    """Scales may take more: those of blocks that cross rows, or that are quantized again."""
    checkpoint = Checkpoint.open(data / tool / "model")
    for module in checkpoint.modules:
        (piece,) = checkpoint.read(module)
        assert (
            piece.parts["codes"].nbytes * 8 == piece.scheme.bits * piece.shape[0] * piece.shape[1]
        )


@each_tool
def test_any_tensor_of_a_layer_that_is_taken_away_is_missed(
    data: Path, tmp_path: Path, tool: str
) -> None:
    file = data / tool / "model" / goldens.WEIGHTS
    tensors, config = load_file(file), (data / tool / "model/config.json").read_text()
    metadata = read_header(data / tool / "model").metadata
    module = "transformer_blocks.0.attn.to_k"
    (tmp_path / "config.json").write_text(config)
    of_layer = [name for name in tensors if name.startswith(f"{module}.")]
    for name in [name for name in of_layer if not name.endswith(UNUSED)]:
        kept = {key: value for key, value in tensors.items() if key != name}
        goldens.rewrite(tmp_path / goldens.WEIGHTS, kept, metadata)
        with pytest.raises(CheckpointError):
            goldens.loaded_model(tmp_path)
        with pytest.raises(CheckpointError):
            mezzotint.convert(tmp_path, tmp_path / "out")


@each_tool
def test_a_tensor_of_another_shape_is_refused(data: Path, tmp_path: Path, tool: str) -> None:
    copy = tmp_path / "layers"
    shutil.copytree(data / tool / "layers", copy)
    tensors, metadata = load_file(copy / goldens.WEIGHTS), read_header(copy).metadata
    for name, value in tensors.items():
        if value.numel() > 1 and "quant_state" not in name:
            changed = tensors | {name: value.flatten()[:-1].clone()}
            goldens.rewrite(copy / goldens.WEIGHTS, changed, metadata)
            with pytest.raises(CheckpointError):
                goldens.decoded_layers(copy, name)


@each_tool
def test_a_scale_that_is_not_finite_is_refused(data: Path, tmp_path: Path, tool: str) -> None:
    copy = tmp_path / "layers"
    shutil.copytree(data / tool / "layers", copy)
    header = read_header(copy)
    contents = detect_format(header).format.contents(header)
    tensors = load_file(copy / goldens.WEIGHTS)
    for linear in contents.linears.values():
        scales = [key for part, key in linear.keys.items() if linear.part(part).scale]
        assert scales
        for key in scales:
            if not tensors[key].dtype.is_floating_point:
                continue
            broken = tensors[key].float().clone()
            broken.view(-1)[0] = float("nan")
            changed = tensors | {key: broken.to(tensors[key].dtype)}
            goldens.rewrite(copy / goldens.WEIGHTS, changed, header.metadata)
            with pytest.raises(CheckpointError, match=r"not finite"):
                goldens.decoded_layers(copy, key)


@each_tool
def test_slices_of_rows_and_columns_are_those_of_the_matrix(data: Path, tool: str) -> None:
    header = read_header(data / tool / "layers")
    contents = detect_format(header).format.contents(header)
    for linear in contents.linears.values():
        whole = goldens.decode(linear, header)
        rows = linear.read_rows(header, 1, 3)
        assert torch.equal(rows.scheme.dequantize(rows.parts), whole[1:3])
        plain = linear.to_plain(linear.read(header))
        if plain.group < plain.shape[1]:
            first = plain.first_columns(plain.group)
            assert torch.equal(first.scheme.dequantize(first.parts), whole[:, : plain.group])
