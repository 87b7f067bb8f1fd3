"""SDNQ: what config.json and the tensors say is checked against each other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.errors import CheckpointError, MissingTensor, ShapeMismatch, UnreadFormat
from mezzotint.formats import StoredLinear, detect_format, read_header
from mezzotint.formats.readers.sdnq import unpack_sdnq
from mezzotint.schemes import INT8
from support.tool_goldens import WEIGHTS, decoded_layers

CODES = torch.ones(4, 32, dtype=torch.int8)


def saved(folder: Path, tensors: dict[str, Tensor], **entries: Any) -> Path:
    """Write a folder of one layer, named `layer`."""
    folder.mkdir(exist_ok=True)
    stored = {f"layer.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(stored, folder / WEIGHTS)
    declared = {"quant_method": "sdnq", "weights_dtype": "int8"} | entries
    (folder / "config.json").write_text(json.dumps({"quantization_config": declared}))
    return folder


def linear_of(folder: Path) -> StoredLinear:
    header = read_header(folder)
    linear = detect_format(header).format.contents(header).linears["layer"]
    linear.check(header)
    return linear


def int8(**more: Tensor) -> dict[str, Tensor]:
    return {"weight": CODES, "scale": torch.ones(4, 1)} | more


@pytest.mark.parametrize("case", ["svd", "hadamard", "hadamard64_svd"])
def test_low_rank_branches_and_rotations_decode_as_sdnq_does(data: Path, case: str) -> None:
    """Within 1e-6: the branch is added in another order. The rotation alone has the same bits."""
    folder = data / "sdnq/transformed" / case
    truth = load_file(data / "sdnq/transformed/truth.safetensors")[case]
    found = decoded_layers(folder)["layer"]
    assert torch.linalg.norm(found - truth) <= 1e-6 * torch.linalg.norm(truth)
    assert "svd" in case or torch.equal(found, truth)


def test_transposed_codes_are_turned(tmp_path: Path) -> None:
    codes = torch.arange(12, dtype=torch.int8).reshape(3, 4)
    folder = saved(tmp_path, {"weight": codes, "scale": torch.ones(1, 4)})
    assert torch.equal(decoded_layers(folder)["layer"], codes.t().float())


def test_inputs_are_quantized_if_the_declaration_asks_for_it(tmp_path: Path) -> None:
    for asked in (True, False):
        linear = linear_of(saved(tmp_path, int8(), use_quantized_matmul=asked))
        assert (linear.scheme, linear.quantizes_activation) == (INT8, asked)


def test_bits_of_a_packed_layer_are_those_that_its_bytes_give(tmp_path: Path) -> None:
    """64 bytes for 4 rows are 32 columns of 4 bits or 64 of 2: the declared dtype decides."""
    tensors = {"weight": torch.zeros(64, dtype=torch.uint8), "scale": torch.ones(4, 1)}
    for dtype, columns in (("int4", 32), ("int2", 64)):
        assert linear_of(saved(tmp_path, tensors, weights_dtype=dtype)).shape == (4, columns)


@pytest.mark.parametrize(
    ("dtype", "others", "found"),
    [
        ("uint4", {}, "zero_point"),
        ("uint4", {"int4": ["layer"]}, ""),
        ("uint2", {"minimum_6bit": ["layer"], "minimum_uint4": ["other"]}, "zero_point"),
    ],
)
def test_codes_without_a_zero_point_are_signed_only_if_that_is_declared(
    tmp_path: Path, dtype: str, others: dict[str, list[str]], found: str
) -> None:
    tensors = {"weight": torch.zeros(64, dtype=torch.uint8), "scale": torch.ones(4, 1)}
    folder = saved(tmp_path, tensors, weights_dtype=dtype, modules_dtype_dict=others)
    if found:
        with pytest.raises(MissingTensor, match=found):
            linear_of(folder)
    else:
        assert linear_of(folder).shape == (4, 32)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_every_bit_of_packed_bytes_is_one_bit_of_a_code(bits: int) -> None:
    """Setting one bit of the bytes sets one bit of one code, and all together set all."""
    size = {3: 3, 5: 5, 6: 3, 7: 7}[bits]
    places = torch.arange(size * 8)
    rows = torch.zeros(size * 8, size, dtype=torch.uint8)
    rows[places, places // 8] = (1 << places % 8).to(torch.uint8)
    codes = unpack_sdnq(rows, bits)
    assert (codes.count_nonzero(1) == 1).all()
    assert (codes.long().sum(0) == 2**bits - 1).all()


@pytest.mark.parametrize(
    ("tensors", "entries", "error", "said"),
    [
        (int8(), {"use_codebook": True}, UnreadFormat, "use_codebook"),
        (int8(), {"modules_quant_config": {"x": {}}}, UnreadFormat, "modules_quant_config"),
        (int8(scale_2=torch.ones(1)), {}, UnreadFormat, "scale_2"),
        (int8(scale=torch.ones(3, 1)), {}, ShapeMismatch, "does not fit"),
        ({"weight": CODES}, {}, MissingTensor, "never taken to be 1.0"),
        (int8(svd_up=torch.ones(4, 2)), {}, MissingTensor, "svd_down"),
        ({"weight": torch.ones(2, 2)}, {}, MissingTensor, "no layer is quantized"),
    ],
)
def test_what_cannot_be_honored_is_refused(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    entries: dict[str, Any],
    error: type[CheckpointError],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        linear_of(saved(tmp_path, tensors, **entries))


def test_a_file_without_its_configuration_is_refused_by_name(tmp_path: Path) -> None:
    save_file({f"layer.{n}": v for n, v in int8().items()}, tmp_path / WEIGHTS)
    with pytest.raises(UnreadFormat, match="SDNQ, without its configuration"):
        linear_of(tmp_path)
