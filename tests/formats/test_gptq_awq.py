"""AutoRound, GPTQ and AWQ: what config.json and the tensors say is checked against each other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.errors import BrokenFile, CheckpointError, MissingTensor, ShapeMismatch, UnreadFormat
from mezzotint.formats import StoredLinear, detect_format, read_header
from mezzotint.schemes import INT_GROUPS
from support.tool_goldens import WEIGHTS, decoded_layers

EIGHTS = -2004318072
"""Eight codes of 8, as a signed word."""


def saved(folder: Path, tensors: dict[str, Tensor], **declared: Any) -> Path:
    """Write a folder of one layer, named `layer`."""
    folder.mkdir(exist_ok=True)
    stored = {f"layer.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(stored, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps({"quantization_config": declared}))
    return folder


def linear_of(folder: Path) -> StoredLinear:
    header = read_header(folder)
    linear = detect_format(header).format.contents(header).linears["layer"]
    linear.check(header)
    linear.read(header)
    return linear


def gptq(**more: Tensor) -> dict[str, Tensor]:
    """Return 32 rows of 64 columns of 4 bits in two groups: code 9, stored zero 8, scale 1."""
    words = {
        "qweight": torch.full((8, 32), EIGHTS + 0x11111111, dtype=torch.int32),
        "qzeros": torch.full((2, 4), EIGHTS, dtype=torch.int32),
    }
    return words | {"scales": torch.ones(2, 32).half()} | more


@pytest.mark.parametrize(
    ("declared", "weight"),
    [
        ({"quant_method": "gptq"}, 0.0),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, 1.0),
        ({"quant_method": "auto-round"}, 0.0),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, 0.0),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}, 1.0),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, 1.0),
    ],
)
def test_gptqs_first_format_stores_one_less_than_the_zero(
    tmp_path: Path, declared: dict[str, str], weight: float
) -> None:
    folder = saved(tmp_path, gptq(), **declared)
    assert linear_of(folder).scheme is INT_GROUPS[4]
    assert decoded_layers(folder)["layer"].unique().tolist() == [weight]


@pytest.mark.parametrize("method", ["awq", "auto-round"])
def test_the_shapes_show_awq_whose_zeros_are_as_they_are(tmp_path: Path, method: str) -> None:
    """Codes of one word are 0 to 7, in the order of AWQ's kernels: 0, 2, 4, 6, 1, 3, 5, 7."""
    word = sum(code << 4 * place for place, code in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    tensors = {
        "qweight": torch.full((64, 4), word, dtype=torch.int32),
        "qzeros": torch.zeros(2, 4, dtype=torch.int32),
        "scales": torch.ones(2, 32).half(),
    }
    decoded = decoded_layers(saved(tmp_path, tensors, quant_method=method))["layer"]
    assert decoded.shape == (32, 64)
    assert decoded[:, 0].tolist() == [*range(8)] * 4


def test_groups_in_order_may_be_listed(tmp_path: Path) -> None:
    index = torch.arange(64, dtype=torch.int32) // 32
    linear_of(saved(tmp_path, gptq(g_idx=index), quant_method="gptq"))
    with pytest.raises(UnreadFormat, match="g_idx reorders the columns"):
        linear_of(saved(tmp_path, gptq(g_idx=index.flip(0)), quant_method="gptq"))


def test_symmetric_codes_have_their_zero_in_the_middle(tmp_path: Path) -> None:
    """A stored zero of 8 is 9 in GPTQ's first format, and 8 in its second."""
    form = {"checkpoint_format": "gptq_v2"}
    linear_of(saved(tmp_path, gptq(), quant_method="gptq", sym=True, **form))
    with pytest.raises(BrokenFile, match="zeros from 9 to 9"):
        linear_of(saved(tmp_path, gptq(), quant_method="gptq", sym=True))


def test_files_without_their_configuration_are_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "gptq_awq/layers", tmp_path / "layers")
    (tmp_path / "layers/config.json").unlink()
    with pytest.raises(UnreadFormat, match="AutoRound, GPTQ or AWQ, without its configuration"):
        decoded_layers(tmp_path / "layers")


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"quant_method": "awq", "version": "gemv"}, "version"),
        ({"quant_method": "auto-round", "data_type": "nv_fp4"}, "data_type"),
        ({"quant_method": "auto-round", "act_bits": 8}, "act_bits 8"),
    ],
)
def test_declarations_that_are_not_read_are_refused(
    tmp_path: Path, declared: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnreadFormat, match=said):
        linear_of(saved(tmp_path, gptq(), **declared))


@pytest.mark.parametrize(
    ("tensors", "error", "said"),
    [
        (gptq(scales=torch.ones(3, 32).half()), ShapeMismatch, "do not fit"),
        (gptq(scales=torch.ones(2, 30).half()), ShapeMismatch, "do not fit"),
        (gptq(qzeros=torch.zeros(1, 4, dtype=torch.int32)), ShapeMismatch, "qzeros"),
        (gptq(qweight=torch.zeros(8, 31, dtype=torch.int32)), ShapeMismatch, "qweight"),
        (gptq(qweight=torch.zeros(8, 32)), ShapeMismatch, "float32"),
        (gptq(g_idx=torch.zeros(3, dtype=torch.int32)), ShapeMismatch, "g_idx"),
        ({"weight": torch.ones(2, 2)}, MissingTensor, "no layer is quantized"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], error: type[CheckpointError], said: str
) -> None:
    with pytest.raises(error, match=said):
        linear_of(saved(tmp_path, tensors, quant_method="gptq"))


def test_a_zero_of_256_is_no_code(tmp_path: Path) -> None:
    tensors = {
        "qweight": torch.zeros(16, 32, dtype=torch.int32),
        "qzeros": torch.full((2, 8), -1, dtype=torch.int32),
        "scales": torch.ones(2, 32).half(),
    }
    with pytest.raises(BrokenFile, match="a zero of 256"):
        linear_of(saved(tmp_path, tensors, quant_method="gptq"))
