"""bitsandbytes' files: what they say is checked, and a public report's files are read."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mezzotint
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import (
    BadScale,
    BrokenFile,
    CheckpointError,
    MissingTensor,
    ShapeMismatch,
    UnreadFormat,
)
from mezzotint.formats import detect_format, read_header
from mezzotint.formats.readers.bitsandbytes import NF4
from mezzotint.schemes import LLM_INT8
from support.tool_goldens import decoded_layers

PUBLISHED = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
    ]
)
"""The table of NF4 as a public report has it, in seven digits."""
STATE = "layer.weight.quant_state.bitsandbytes__nf4"


def text(**entries: Any) -> Tensor:
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def state(rows: int, columns: int, **changes: Any) -> Tensor:
    entries = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
    return text(**entries | {"shape": [rows, columns]} | changes)


def nf4(matrix: Tensor, levels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of NF4 behind a layer's name, and the matrix that they stand for."""
    flat = matrix.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % 64)).reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    index = ((blocks / absmax[:, None])[..., None] - levels).abs().argmin(-1)
    truth = (levels[index] * absmax[:, None]).reshape(-1)[: flat.numel()].reshape(matrix.shape)
    codes = index.reshape(-1)[: flat.numel()].to(torch.uint8)
    tensors = {
        "weight": (codes[::2] * 16 + codes[1::2])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": levels.clone(),
        "weight.quant_state.bitsandbytes__nf4": state(*matrix.shape),
    }
    return tensors, truth


def layer(rows: int = 4, columns: int = 48) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors, _ = nf4(torch.randn(rows, columns), torch.tensor(NF4))
    return {f"layer.{name}": value for name, value in tensors.items()}


def saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_bnb_nf4_flux(tmp_path: Path) -> None:
    """The report's all-in-one file and diffusers folder decode to the report's own values."""
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2}
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, joint_attention_dim=64, axes_dims_rope=(8, 12, 12), **sizes
    ).bfloat16()
    stored, truth = dict(model.state_dict()), {}
    for name in [n for n, v in stored.items() if "blocks" in n and v.ndim == 2]:
        module = name.removesuffix(".weight")
        tensors, truth[module] = nf4(stored.pop(name), PUBLISHED)
        stored |= {f"{module}.{suffix}": value for suffix, value in tensors.items()}
    prefixed = {f"model.diffusion_model.{name}": value for name, value in stored.items()}
    other = {"vae.decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}
    folder = tmp_path / "diffusers"
    saved(folder, stored)
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = json.loads(model.to_json_string()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    for path in (saved(tmp_path / "aio", prefixed | other), folder):
        checkpoint = Checkpoint.open(path)
        assert checkpoint.detected.format.name == "bitsandbytes"
        assert checkpoint.report.problems == ()
        assert sorted(truth) == checkpoint.modules
        assert all(torch.equal(checkpoint.weight(name), truth[name]) for name in truth)
    assert mezzotint.verify(folder).exit_code == 0


def test_a_block_that_crosses_rows_gives_each_row_its_scale(tmp_path: Path) -> None:
    matrix = torch.randn(3, 20)
    tensors, truth = nf4(matrix, torch.tensor(NF4))
    file = saved(tmp_path, {f"layer.{name}": value for name, value in tensors.items()})
    assert len(tensors["weight.absmax"]) == 1
    assert torch.equal(decoded_layers(file)["layer"], truth)


def test_a_table_of_other_levels_is_refused(tmp_path: Path) -> None:
    tensors = layer()
    tensors["layer.weight.quant_map"][3] += 1e-3
    with pytest.raises(BadScale, match=r"quant_map holds .* expected the levels of nf4"):
        decoded_layers(saved(tmp_path, tensors))


def test_an_odd_number_of_input_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeMismatch, match="two codes of a byte would belong to two rows"):
        decoded_layers(saved(tmp_path, layer() | {STATE: state(64, 3)}))


@pytest.mark.parametrize(
    ("entries", "error", "said"),
    [
        ({"blocksize": 48}, UnreadFormat, "expected a power of two"),
        ({"blocksize": 2**62}, UnreadFormat, "expected a power of two"),
        ({"shape": [4]}, BrokenFile, "shape"),
        ({"shape": [4, 0]}, BrokenFile, "shape"),
        ({"shape": [2**40, 2**40]}, ShapeMismatch, "expected"),
        ({"quant_type": "fp4"}, BrokenFile, "its name says another"),
        ({"rotation": "hadamard"}, BrokenFile, "rotation"),
        ({"nested_offset": 0.5, "nested_blocksize": 256}, MissingTensor, "nested_absmax"),
    ],
)
def test_a_state_that_cannot_be_honored_is_refused(
    tmp_path: Path, entries: dict[str, Any], error: type[CheckpointError], said: str
) -> None:
    with pytest.raises(error, match=said):
        decoded_layers(saved(tmp_path, layer() | {STATE: state(4, 48, **entries)}))


def test_a_lost_state_is_missed(tmp_path: Path) -> None:
    tensors = layer()
    del tensors[STATE]
    with pytest.raises(MissingTensor, match="quant_state"):
        decoded_layers(saved(tmp_path, tensors))


def test_a_configuration_without_quantized_layers_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, {"layer.weight": torch.zeros(2, 2)})
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MissingTensor, match="no layer is quantized"):
        decoded_layers(tmp_path)


def int8(**more: Tensor) -> dict[str, Tensor]:
    tensors = {"weight": torch.ones(4, 6, dtype=torch.int8), "SCB": torch.ones(4)} | more
    return {f"layer.{name}": value for name, value in tensors.items()}


def test_llm_int8_needs_the_scales_of_each_int8_weight(tmp_path: Path) -> None:
    other = {"other.weight": torch.ones(4, 6, dtype=torch.int8)}
    with pytest.raises(MissingTensor, match=r"other\.SCB"):
        decoded_layers(saved(tmp_path, int8() | other))


def test_llm_int8_in_the_order_of_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadFormat, match="expected 0"):
        decoded_layers(saved(tmp_path, int8(weight_format=torch.tensor(2).to(torch.uint8))))


def test_llm_int8_inputs_are_quantized_as_bitsandbytes_does(data: Path) -> None:
    """Columns with an outlier stay as they are; those of the golden input are 3 and 17."""
    theirs = load_file(data / "bitsandbytes/inputs.safetensors")
    x, columns = theirs["x"].float(), theirs["outlier_columns"].tolist()
    ours = LLM_INT8.quantize_activation(x, {"outlier_threshold": torch.tensor(6.0)})
    decoded = theirs["codes"].float() * (theirs["row_amax"] / 127).unsqueeze(1)
    decoded[:, columns] = x[:, columns]
    assert columns == [3, 17]
    assert torch.equal(ours, decoded)


def test_the_threshold_of_outliers_is_the_configurations(tmp_path: Path) -> None:
    saved(tmp_path, int8())
    for declared, found in ((4.5, 4.5), (0, None), (None, 6.0)):
        config = {"quant_method": "bitsandbytes"} | (
            {} if declared is None else {"llm_int8_threshold": declared}
        )
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        header = read_header(tmp_path)
        linear = detect_format(header).format.contents(header).linears["layer"]
        assert linear.implied_values.get("outlier_threshold") == found
