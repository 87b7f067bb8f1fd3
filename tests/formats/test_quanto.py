"""optimum-quanto: shapes that the tensors do not show, offsets, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import BrokenFile, CheckpointError, MissingTensor, ShapeMismatch, UnreadFormat
from mezzotint.formats import StoredLinear, detect_format, read_header
from mezzotint.schemes import INT8, INT_GROUPS, INT_SHIFTED
from support.tool_goldens import WEIGHTS, decoded_layers

SCALE, SHIFT = torch.full((4, 1), 0.5), torch.full((4, 1), 2.0)


def saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Write a folder of one layer, named `layer`."""
    folder.mkdir(exist_ok=True)
    stored = {f"layer.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(stored, folder / WEIGHTS)
    return folder


def linear_of(folder: Path) -> StoredLinear:
    header = read_header(folder)
    linear = detect_format(header).format.contents(header).linears["layer"]
    linear.check(header)
    linear.read(header)
    return linear


def int4(**more: Tensor) -> dict[str, Tensor]:
    """Return 4 groups of 32 codes: 0 to 3 by group, and a bias of one number for each."""
    packed = torch.tensor([[0x20], [0x31]], dtype=torch.uint8).expand(2, 32)
    parts = {"weight._data._data": packed, "weight._scale": SCALE, "weight._shift": SHIFT}
    return parts | {"bias": torch.zeros(4)} | more


def int8(**more: Tensor) -> dict[str, Tensor]:
    return {"weight._data": torch.ones(4, 32, dtype=torch.int8), "weight._scale": SCALE} | more


def test_bytes_have_rows_far_apart_and_the_bias_counts_the_rows(tmp_path: Path) -> None:
    decoded = decoded_layers(saved(tmp_path, int4()))["layer"]
    assert torch.equal(decoded[:, 0], torch.tensor([-2.0, -1.5, -1.0, -0.5]))
    assert linear_of(tmp_path).scheme is INT_SHIFTED[4]
    two = decoded_layers(saved(tmp_path, int4(bias=torch.zeros(2))))["layer"]
    assert torch.equal(two, decoded.reshape(2, 64))


def test_without_a_bias_the_model_of_the_configuration_shows_the_rows(
    data: Path, tmp_path: Path
) -> None:
    """`to_k` stands for a model without biases: its own is taken away, and the module stays."""
    folder, module = tmp_path / "model", "transformer_blocks.0.attn.to_k"
    shutil.copytree(data / "quanto/model", folder)
    expected = Checkpoint.open(folder).weight(module)
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"{module}.bias"]
    save_file(tensors, folder / WEIGHTS)
    header = read_header(folder)
    linear = detect_format(header).format.contents(header).linears[module]
    weight = linear.read(header)
    assert torch.equal(weight.scheme.dequantize(weight.parts), expected)
    (folder / "config.json").unlink()
    with pytest.raises(UnreadFormat, match=r"put the model's config\.json"):
        Checkpoint.open(folder)


def test_integer_shifts_are_zero_points(tmp_path: Path) -> None:
    folder = saved(tmp_path, int4(**{"weight._shift": SHIFT.to(torch.uint8)}))
    assert linear_of(folder).scheme is INT_GROUPS[4]
    decoded = decoded_layers(folder)["layer"]
    assert torch.equal(decoded[:, 0], torch.tensor([-1.0, -0.5, 0.0, 0.5]))


def test_scales_of_one_for_inputs_and_outputs_are_ignored(tmp_path: Path) -> None:
    scales = {"input_scale": torch.ones(()), "output_scale": torch.ones(()).bfloat16()}
    folder = saved(tmp_path, int8(**scales))
    header = read_header(folder)
    contents = detect_format(header).format.contents(header)
    assert set(contents.ignored) == {"layer.input_scale", "layer.output_scale"}
    linear = contents.linears["layer"]
    assert (linear.scheme, linear.quantizes_activation) == (INT8, False)


@pytest.mark.parametrize(
    ("tensors", "error", "said"),
    [
        (int8(output_scale=torch.tensor(0.5)), UnreadFormat, "outputs of layers are quantized"),
        (int8(input_scale=torch.ones(3)), ShapeMismatch, "input_scale"),
        (int8(**{"weight._data": torch.ones(4, 32)}), UnreadFormat, "float32"),
        (int8(**{"weight._scale": torch.ones(3, 1)}), ShapeMismatch, "_scale"),
        ({"weight._data": torch.ones(4, 32, dtype=torch.int8)}, MissingTensor, "never taken"),
        (int4(bias=torch.zeros(3)), ShapeMismatch, "3 rows of whole groups"),
        (int4(**{"weight._scale": torch.ones(8, 1)}), CheckpointError, "_shift"),
        (int4(**{"weight._scale": torch.ones(9, 1)}), ShapeMismatch, "do not give"),
        (int4(**{"weight._shift": SHIFT.bfloat16()}), ShapeMismatch, "bfloat16"),
        (int4(**{"weight._shift": (SHIFT - 3).to(torch.int8)}), BrokenFile, "-1"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], error: type[CheckpointError], said: str
) -> None:
    with pytest.raises(error, match=said):
        linear_of(saved(tmp_path, tensors))


def test_a_declaration_without_quantized_layers_is_refused(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "quanto", "weights_dtype": "int8"}}
    (saved(tmp_path, {"weight": torch.ones(2, 2)}) / "config.json").write_text(json.dumps(config))
    with pytest.raises(MissingTensor, match="no layer is quantized"):
        linear_of(tmp_path)
