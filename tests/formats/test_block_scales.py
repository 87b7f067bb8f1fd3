"""FP8 and INT8 in blocks: which block a number of scales means, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mezzotint
from mezzotint.errors import CheckpointError, MissingTensor, ShapeMismatch, UnreadFormat
from mezzotint.formats import StoredLinear, detect_format, read_header
from mezzotint.schemes import FP8, FP8_E5M2, FP8_GROUPS, INT8, INT_GROUPS, Scheme
from support.tool_goldens import WEIGHTS, decoded_layers

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
INVERSE = "weight_scale_inv"


def saved(folder: Path, tensors: dict[str, Tensor], declared: Any = None) -> Path:
    """Write a folder of one layer, named `layer`."""
    folder.mkdir(exist_ok=True)
    stored = {f"layer.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(stored, folder / WEIGHTS)
    config = {} if declared is None else {"quantization_config": declared}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def linear_of(folder: Path) -> StoredLinear:
    header = read_header(folder)
    linear = detect_format(header).format.contents(header).linears["layer"]
    linear.check(header)
    return linear


def spread(scale: Tensor, rows: int, columns: int, shape: tuple[int, int]) -> Tensor:
    whole = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return whole[: shape[0], : shape[1]]


@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
@pytest.mark.parametrize("name", [INVERSE, "weight_scale", "scale_weight"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((256, 256), (128, 128)),
        ((300, 288), (128, 128)),
        ((129, 500), (128, 128)),
        ((200, 192), (64, 64)),
        ((33, 130), (32, 64)),
        ((12, 192), (1, 96)),
    ],
)
def test_the_number_of_scales_shows_the_block(
    tmp_path: Path, shape: tuple[int, int], block: tuple[int, int], name: str, dtype: torch.dtype
) -> None:
    """Rows and columns of 288 in 3 blocks are 128, 128 and 32, as DeepSeek cuts them."""
    torch.manual_seed(0)
    codes = torch.randn(shape).mul(20).to(dtype)
    scale = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) + 0.1
    folder = saved(tmp_path, {"weight": codes, name: scale})
    truth = codes.float() * spread(scale, *block, shape)
    assert linear_of(folder).scheme is (FP8_GROUPS if dtype is E4M3 else INT_GROUPS[8])
    assert torch.equal(decoded_layers(folder)["layer"], truth)


def test_the_declaration_may_state_the_block(tmp_path: Path) -> None:
    """Three blocks of 120 would otherwise be taken for 128."""
    scale = torch.arange(1.0, 10).reshape(3, 3)
    tensors = {"weight": torch.ones(300, 300).to(E4M3), INVERSE: scale}
    declared = {"quant_method": "fp8", "weight_block_size": [120, 120]}
    folder = saved(tmp_path, tensors, declared)
    assert torch.equal(decoded_layers(folder)["layer"], spread(scale, 120, 120, (300, 300)))
    without = saved(tmp_path / "without", tensors)
    assert torch.equal(decoded_layers(without)["layer"], spread(scale, 128, 128, (300, 300)))


@pytest.mark.parametrize(
    ("dtype", "scale", "scheme"),
    [
        (E4M3, torch.ones(()), FP8),
        (E4M3, torch.ones(4, 1), FP8),
        (E5M2, torch.ones(4, 1), FP8_E5M2),
        (torch.int8, torch.ones(4), INT8),
    ],
)
def test_a_declared_file_may_have_layers_without_blocks(
    tmp_path: Path, dtype: torch.dtype, scale: Tensor, scheme: Scheme
) -> None:
    tensors = {"weight": torch.ones(4, 32).to(dtype), "weight_scale": scale}
    linear = linear_of(saved(tmp_path, tensors, {"quant_method": "fp8"}))
    assert (linear.scheme, linear.quantizes_activation) == (scheme, False)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_codes_that_are_not_finite_are_broken(data: Path, tmp_path: Path, dtype: object) -> None:
    """0x7C is 256 in e4m3, and infinite in e5m2."""
    folder = tmp_path / "model"
    shutil.copytree(data / "block_scales/model", folder)
    tensors, name = load_file(folder / WEIGHTS), "transformer_blocks.0.attn.to_k.weight"
    codes = tensors[name].view(torch.uint8).clone()
    for value, is_broken in ((0x7C, dtype is E5M2), (0x7F, True)):
        codes[0, 0] = value
        save_file(tensors | {name: codes.view(dtype)}, folder / WEIGHTS)
        found = [finding.message for finding in mezzotint.verify(folder).findings]
        assert any("contains a" in message for message in found) == is_broken


@pytest.mark.parametrize(
    ("tensors", "error", "said"),
    [
        ({"weight": torch.ones(4, 4).to(E4M3)}, MissingTensor, "never taken to be 1.0"),
        ({"weight": torch.ones(4, 4)}, MissingTensor, "no layer is quantized"),
        (
            {"weight": torch.ones(4, 4, 1).to(E4M3), INVERSE: torch.ones(1, 1)},
            ShapeMismatch,
            "weight",
        ),
        ({"weight": torch.ones(7, 10).to(E4M3), INVERSE: torch.ones(7, 4)}, UnreadFormat, "7, 4"),
        (
            {"weight": torch.ones(4, 4).to(E4M3), INVERSE: torch.ones(2, 2, dtype=torch.int32)},
            ShapeMismatch,
            "expected",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], error: type[CheckpointError], said: str
) -> None:
    with pytest.raises(error, match=said):
        linear_of(saved(tmp_path, tensors, {"quant_method": "fp8"}))
