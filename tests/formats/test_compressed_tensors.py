"""compressed-tensors: what config.json and the tensors say is checked against each other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.errors import (
    CheckpointError,
    MissingTensor,
    ShapeMismatch,
    UnknownFormat,
    UnreadFormat,
)
from mezzotint.formats import StoredLinear, detect_format, read_header, targets
from mezzotint.schemes import FP8, FP8_GROUPS, INT8, NVFP4
from mezzotint.schemes.nvfp4 import encode_nvfp4
from mezzotint.tensor import PLAIN, QuantTensor
from support.tool_goldens import WEIGHTS, decoded_layers

FP8_CODES = torch.ones(4, 32).to(torch.float8_e4m3fn)
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def group(
    bits: int, kind: str, inputs: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True} | more
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs}


def saved(
    folder: Path, tensors: dict[str, Tensor], *groups: dict[str, Any], **entries: Any
) -> Path:
    """Write a folder of one layer, named `layer`."""
    folder.mkdir(exist_ok=True)
    stored = {f"layer.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(stored, folder / WEIGHTS)
    declared = {"quant_method": "compressed-tensors"} | entries
    declared["config_groups"] = {f"group_{i}": each for i, each in enumerate(groups)}
    (folder / "config.json").write_text(json.dumps({"quantization_config": declared}))
    return folder


def linear_of(folder: Path) -> StoredLinear:
    header = read_header(folder)
    linear = detect_format(header).format.contents(header).linears["layer"]
    linear.check(header)
    return linear


def words(rows: int = 4, columns: int = 32, bits: int = 4) -> dict[str, Tensor]:
    return {
        "weight_packed": torch.zeros(rows, columns * bits // 32, dtype=torch.int32),
        "weight_scale": torch.ones(rows, 1),
        "weight_shape": torch.tensor([rows, columns]),
    }


def nvfp4(**more: Tensor) -> dict[str, Tensor]:
    return {
        "weight_packed": torch.full((4, 16), 0x21, dtype=torch.uint8),
        "weight_scale": torch.full((4, 2), 2.0).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([4.0]),
    } | more


def test_the_outer_scale_of_nvfp4_divides(tmp_path: Path) -> None:
    folder = saved(tmp_path, nvfp4(), group(4, "float"))
    linear = linear_of(folder)
    assert (linear.scheme, linear.quantizes_activation) == (NVFP4, False)
    assert decoded_layers(folder)["layer"][0, :2].tolist() == [0.25, 0.5]


def test_the_static_input_scale_of_nvfp4_divides(tmp_path: Path) -> None:
    inputs = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "dynamic": "local"}
    tensors = nvfp4(input_global_scale=torch.tensor([8.0]))
    folder = saved(tmp_path, tensors, group(4, "float", inputs))
    linear = linear_of(folder)
    assert linear.quantizes_activation
    assert linear.read(read_header(folder)).parts["input_scale"].item() == 0.125
    lost = saved(tmp_path / "lost", nvfp4(), group(4, "float", inputs))
    with pytest.raises(MissingTensor, match="input_global_scale"):
        linear_of(lost)


def test_the_outer_scale_of_nvfp4_is_divided_by_and_not_multiplied(tmp_path: Path) -> None:
    """1/3 is no float32 number: 9 * (1/3) is not 9 / 3 in the last place for some scales."""
    scales = torch.arange(8.0, 16).repeat(4, 1).to(torch.float8_e4m3fn)
    tensors = nvfp4(weight_global_scale=torch.tensor([3.0]), weight_scale=scales)
    tensors["weight_packed"] = torch.full((4, 64), 0x22, dtype=torch.uint8)
    folder = saved(tmp_path, tensors, group(4, "float"))
    decoded = decoded_layers(folder)["layer"][0, ::16]
    assert torch.equal(decoded, torch.arange(8.0, 16) / 3)
    assert not torch.equal(decoded, torch.arange(8.0, 16) * (1 / torch.tensor(3.0)))


@pytest.mark.parametrize("to", ["comfy", "modelopt"])
def test_formats_that_multiply_report_the_rounded_reciprocal(to: str) -> None:
    parts = encode_nvfp4(torch.randn(32, 64)) | {"input_scale": torch.tensor(0.1)}
    piece = QuantTensor(NVFP4, PLAIN, (32, 64), parts | {"global_divisor": torch.tensor(3.0)})
    stored = targets()[to].layer({"x": [piece]})
    assert any("rounded to float32" in change for change in stored.transforms)
    assert not any("divisor" in name for name in stored.tensors)


def test_dynamic_inputs_of_fp8_have_a_scale_per_row(tmp_path: Path) -> None:
    tensors = {"weight": FP8_CODES, "weight_scale": torch.ones(4, 1)}
    linear = linear_of(saved(tmp_path, tensors, group(8, "float", DYNAMIC)))
    assert (linear.scheme, linear.dynamic_input) == (FP8, True)


def test_weights_without_declared_inputs_leave_inputs_alone(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(4, 32, dtype=torch.int8), "weight_scale": torch.ones(4, 1)}
    linear = linear_of(saved(tmp_path, tensors, group(8, "int")))
    assert (linear.scheme, linear.quantizes_activation) == (INT8, False)


def test_static_inputs_need_their_scale(tmp_path: Path) -> None:
    tensors = {"weight": FP8_CODES, "weight_scale": torch.ones(1)}
    inputs = DYNAMIC | {"dynamic": False, "strategy": "tensor"}
    with pytest.raises(MissingTensor, match="input_scale"):
        linear_of(saved(tmp_path, tensors, group(8, "float", inputs)))


def test_a_block_of_scales_is_that_of_its_rows_and_columns(tmp_path: Path) -> None:
    """Blocks of 16 x 16 do not divide 20 x 40: the last ones are cut."""
    scale = torch.arange(1.0, 7).reshape(2, 3)
    tensors = {"weight": torch.ones(20, 40).to(torch.float8_e4m3fn), "weight_scale": scale}
    declared = group(8, "float", strategy="block", block_structure=[16, 16])
    folder = saved(tmp_path, tensors, declared)
    whole = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)[:20, :40]
    assert linear_of(folder).scheme is FP8_GROUPS
    assert torch.equal(decoded_layers(folder)["layer"], whole)


def test_groups_that_disagree_about_inputs_are_refused(tmp_path: Path) -> None:
    tensors = {"weight": FP8_CODES, "weight_scale": torch.ones(1)}
    with pytest.raises(UnknownFormat, match="several ways"):
        linear_of(saved(tmp_path, tensors, group(8, "float"), group(8, "float", DYNAMIC)))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "transform_config"),
    ],
)
def test_declarations_that_are_not_read_are_refused(
    tmp_path: Path, entries: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnreadFormat, match=said):
        linear_of(saved(tmp_path, words(), group(4, "int"), **entries))


def test_empty_declarations_say_nothing(tmp_path: Path) -> None:
    entries = {"sparsity_config": {"format": "dense"}, "transform_config": {}}
    linear_of(saved(tmp_path, words(), group(4, "int"), **entries, kv_cache_scheme=None))


def test_quantized_outputs_are_refused(tmp_path: Path) -> None:
    declared = group(4, "int") | {"output_activations": {"num_bits": 8}}
    with pytest.raises(UnreadFormat, match="outputs"):
        linear_of(saved(tmp_path, words(), declared))


def test_reordered_columns_are_refused_by_name(tmp_path: Path) -> None:
    tensors = words() | {"weight_g_idx": torch.zeros(32, dtype=torch.int32)}
    with pytest.raises(UnreadFormat, match="weight_g_idx reorders the columns"):
        linear_of(saved(tmp_path, tensors, group(4, "int")))


def test_mxfp4_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {
        "weight_packed": torch.zeros(4, 16, dtype=torch.uint8),
        "weight_scale": torch.zeros(4, 1, dtype=torch.uint8),
    }
    with pytest.raises(UnreadFormat, match="mxfp4-pack-quantized"):
        linear_of(saved(tmp_path, tensors, group(4, "float")))


@pytest.mark.parametrize(
    ("tensors", "declared", "error", "said"),
    [
        (words(), group(8, "int"), ShapeMismatch, "do not give"),
        (words() | {"weight_shape": torch.tensor([4])}, group(4, "int"), ShapeMismatch, "integers"),
        (words() | {"weight_shape": torch.tensor([0, 32])}, group(4, "int"), CheckpointError, "0"),
        (words(4, 32, 3), group(3, "int", symmetric=False), MissingTensor, "weight_zero_point"),
        (nvfp4(), group(4, "float", DYNAMIC), UnreadFormat, "inputs of 8 bits"),
    ],
)
def test_tensors_that_the_declaration_contradicts_are_refused(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    declared: dict[str, Any],
    error: type[CheckpointError],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        linear_of(saved(tmp_path, tensors, declared))


def test_a_declaration_without_quantized_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingTensor, match="no layer is quantized"):
        linear_of(saved(tmp_path, {"weight": torch.ones(2, 2)}, group(4, "int")))
