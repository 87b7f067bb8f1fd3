"""torchao's entries in the header: what they say is checked against the tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.errors import (
    BadScale,
    BrokenFile,
    CheckpointError,
    MissingTensor,
    ShapeMismatch,
    UnreadFormat,
)
from mezzotint.formats import StoredLinear, detect_format, read_header
from mezzotint.schemes import FP8, FP8_GROUPS, INT8, MXFP8, NVFP4
from support.tool_goldens import WEIGHTS, decoded_layers

CODES = torch.ones(4, 32, dtype=torch.int8)
DYNAMIC = {"_data": {"mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}}}
UNPACKED = "IntxUnpackedToInt8Tensor"


def tensors(
    codes: Tensor = CODES, scale: Tensor | None = None, **more: Tensor
) -> dict[str, Tensor]:
    found = {"qdata": codes, "scale": torch.ones(4, 1) if scale is None else scale} | more
    return {f"layer._weight_{name}": value for name, value in found.items()}


def saved(folder: Path, stored: dict[str, Tensor], kind: str = "Int8Tensor", **data: Any) -> Path:
    """Write a folder of one layer, named `layer`, with an entry of a class in the header."""
    names = [name.removeprefix("layer._weight_") for name in stored]
    entry = {"_type": kind, "_data": {"block_size": [1, 32]} | data, "_tensor_data_names": names}
    metadata = {"layer.weight": json.dumps(entry), "tensor_names": '["layer.weight"]'}
    save_file({n: v.contiguous() for n, v in stored.items()}, folder / WEIGHTS, metadata)
    return folder


def linear_of(folder: Path) -> StoredLinear:
    header = read_header(folder)
    linear = detect_format(header).format.contents(header).linears["layer"]
    linear.check(header)
    return linear


def int4(target: str = "int4") -> dict[str, Any]:
    return {"target_dtype": {"_type": "torch.dtype", "_data": target}, "block_size": [1, 16]}


def test_dynamic_inputs_are_quantized_if_their_mapping_is_symmetric(tmp_path: Path) -> None:
    for kwargs, dynamic in ((DYNAMIC, True), (None, False), (asymmetric(), False)):
        linear = linear_of(saved(tmp_path, tensors(), act_quant_kwargs=kwargs))
        assert (linear.scheme, linear.quantizes_activation) == (INT8, dynamic)


def asymmetric() -> dict[str, Any]:
    return {"_data": {"mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"}}}


def test_an_empty_block_is_the_whole_matrix(tmp_path: Path) -> None:
    codes, scale = CODES.to(torch.float8_e4m3fn), torch.tensor(0.5)
    folder = saved(tmp_path, tensors(codes, scale), "Float8Tensor", block_size=[])
    assert linear_of(folder).scheme is FP8
    assert torch.equal(decoded_layers(folder)["layer"], torch.full((4, 32), 0.5))


def test_e5m2_keeps_its_numbers(tmp_path: Path) -> None:
    codes = torch.full((4, 32), 1.75).to(torch.float8_e5m2)
    folder = saved(tmp_path, tensors(codes), "Float8Tensor")
    assert linear_of(folder).scheme is FP8_GROUPS
    assert torch.equal(decoded_layers(folder)["layer"], torch.full((4, 32), 1.75))


def microscaling(codes: torch.dtype, scale: torch.dtype, group: int) -> dict[str, Tensor]:
    values = torch.full((4, 32), 16, dtype=torch.uint8)
    scales = torch.full((4, 32 // group), 64, dtype=torch.uint8)
    return tensors(values.view(codes), scales.view(scale))


E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


def test_inputs_of_microscaling_classes_follow_the_entry(tmp_path: Path) -> None:
    mx, fp4 = microscaling(E4M3, E8M0, 32), microscaling(torch.uint8, E4M3, 8)
    for kwargs, scheme in ((None, FP8_GROUPS), ({"_data": {}}, MXFP8)):
        said = {"block_size": 32, "act_quant_kwargs": kwargs}
        assert linear_of(saved(tmp_path, mx, "MXTensor", **said)).scheme is scheme
        said["block_size"] = 16
        linear = linear_of(saved(tmp_path, fp4, "NVFP4Tensor", **said))
        assert (linear.scheme, linear.quantizes_activation) == (NVFP4, kwargs is not None)


@pytest.mark.parametrize(
    ("stored", "kind", "data", "error", "said"),
    [
        (microscaling(torch.uint8, E8M0, 16), "MXTensor", {}, UnreadFormat, "only FP8 is read"),
        (
            microscaling(E4M3, E8M0, 32),
            "MXTensor",
            {"block_size": 16},
            UnreadFormat,
            "blocks of 16",
        ),
        (
            microscaling(E5M2, E8M0, 32),
            "MXTensor",
            {"act_quant_kwargs": {"_data": {}}},
            UnreadFormat,
            "float8_e5m2",
        ),
        (microscaling(E4M3, E4M3, 8), "NVFP4Tensor", {"block_size": 16}, ShapeMismatch, "NVFP4"),
        (microscaling(E4M3, E8M0, 16), "MXTensor", {}, ShapeMismatch, "_weight_scale"),
        ({"layer._weight_scale": torch.ones(4, 1)}, "MXTensor", {}, MissingTensor, "qdata"),
    ],
)
def test_microscaling_that_is_not_read_is_refused(
    tmp_path: Path,
    stored: dict[str, Tensor],
    kind: str,
    data: dict[str, Any],
    error: type[CheckpointError],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        linear_of(saved(tmp_path, stored, kind, **({"block_size": 32} | data)))


def test_codes_of_fewer_bits_are_packed_when_they_are_read(tmp_path: Path) -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(4, 2)
    zero = torch.tensor([[1, -2]], dtype=torch.int8).repeat(4, 1)
    stored = tensors(codes, torch.ones(4, 2), zero_point=zero)
    folder = saved(tmp_path, stored, UNPACKED, **int4())
    linear = linear_of(folder)
    assert linear.read(read_header(folder)).parts["codes"].shape == (4, 16)
    expected = codes.float() - zero.float().repeat_interleave(16, 1)
    assert torch.equal(decoded_layers(folder)["layer"], expected)


def test_codes_out_of_range_are_refused(tmp_path: Path) -> None:
    stored = tensors(CODES * 9, torch.ones(4, 2), zero_point=torch.zeros(4, 2, dtype=torch.int8))
    with pytest.raises(BrokenFile, match="codes from 9 to 9, expected -8 to 7"):
        decoded_layers(saved(tmp_path, stored, UNPACKED, **int4()))


def test_int8_rows_with_zero_points_are_refused(tmp_path: Path) -> None:
    stored = tensors(zero_point=torch.ones(4, 1, dtype=torch.int8))
    with pytest.raises(BadScale, match="zero points other than 0"):
        decoded_layers(saved(tmp_path, stored))


@pytest.mark.parametrize(
    ("kind", "data", "more", "error", "said"),
    [
        ("Int4TilePackedTo4dTensor", {}, {}, UnreadFormat, "Int4TilePackedTo4dTensor"),
        ("Int8Tensor", {}, {"act_pre_scale": torch.ones(32)}, UnreadFormat, "act_pre_scale"),
        ("Int8Tensor", {"block_size": [1, 2, 3]}, {}, BrokenFile, "block_size"),
        ("Int8Tensor", {"block_size": [1, 0]}, {}, BrokenFile, "block_size"),
        ("Float8Tensor", {}, {}, ShapeMismatch, "in a Float8Tensor"),
        (UNPACKED, int4("int1"), {}, UnreadFormat, "int1"),
        (UNPACKED, int4() | {"block_size": [1, 32]}, {}, MissingTensor, "zero_point"),
    ],
)
def test_entries_that_cannot_be_honored_are_refused(
    tmp_path: Path,
    kind: str,
    data: dict[str, Any],
    more: dict[str, Tensor],
    error: type[CheckpointError],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        linear_of(saved(tmp_path, tensors(**more), kind, **data))


def test_tensors_without_entries_are_refused_by_name(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / WEIGHTS)
    with pytest.raises(UnreadFormat, match="torchao, without its entries"):
        linear_of(tmp_path)


def test_a_declaration_without_entries_is_refused(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.ones(2, 2)}, tmp_path / WEIGHTS)
    config = {"quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MissingTensor, match="describes no quantized weight"):
        linear_of(tmp_path)
