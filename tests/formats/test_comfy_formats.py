"""ComfyUI's integer formats and e5m2: weights bit for bit, products, conversion there and back."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import mezzotint
from mezzotint.checkpoint import Checkpoint, inspect
from mezzotint.errors import BrokenFile, MezzotintError, ShapeMismatch, UnreadFormat
from mezzotint.formats.comfy_config import read_config
from mezzotint.loading import Placement, load, plan
from mezzotint.nn import quant_linears
from mezzotint.schemes import FP8, FP8_E5M2, INT4_ROWS
from support.comfy_files import FORMS, marker, stored_layer

Tensors = dict[str, Tensor]
QUERY = "transformer_blocks.0.attn.to_q"
MARKER = ".comfy_quant"
SIZES = {
    "num_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "in_channels": 64,
    "out_channels": 16,
    "axes_dims_rope": (8, 12, 12),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = diffusers.QwenImageTransformer2DModel(**SIZES)
    return made.bfloat16()


def state(model: nn.Module) -> Tensors:
    return {name: value.clone() for name, value in model.state_dict().items()}


def in_form(weights: Tensors, *forms: str) -> tuple[Tensors, Tensors]:
    """Return the blocks' matrices in these forms, in turn, and what they stand for."""
    stored, truth = dict(weights), {}
    layers = [
        n for n, v in weights.items() if "blocks" in n and n.endswith(".weight") and v.ndim == 2
    ]
    for number, name in enumerate(layers):
        module = name.removesuffix(".weight")
        tensors, truth[module] = stored_layer(module, weights[name], forms[number % len(forms)])
        stored |= tensors
    return stored, truth


def saved(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata)
    return file


def raw(value: Tensor) -> tuple[list[int], bytes]:
    return list(value.shape), bytes(value.reshape(-1).view(torch.uint8).tolist())


def notes(tensors: Tensors) -> dict[str, object]:
    return {
        name: read_config(json.loads(bytes(value.tolist())), name)
        for name, value in tensors.items()
        if name.endswith(MARKER)
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_sound_stands_for_its_weights_and_comes_back_byte_for_byte(
    model: nn.Module, tmp_path: Path, form: str
) -> None:
    tensors, truth = in_form(state(model), form)
    file = saved(tmp_path / "in", tensors)
    checkpoint = Checkpoint.open(file)
    assert checkpoint.report.format == "ComfyUI single file"
    for module, expected in truth.items():
        assert torch.equal(checkpoint.weight(module), expected), module
    assert mezzotint.verify(file).exit_code == 0
    mezzotint.convert(file, tmp_path / "mz", to="mezzotint")
    written = Checkpoint.open(tmp_path / "mz")
    for module, expected in truth.items():
        assert torch.equal(written.weight(module), expected), module
    report = mezzotint.convert(tmp_path / "mz", tmp_path / "back.safetensors", to="comfy")
    assert not report.transforms
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        if not name.endswith(MARKER):
            assert back[name].dtype == value.dtype, name
            assert raw(back[name]) == raw(value), name
    assert notes(back) == notes(tensors)


@pytest.mark.parametrize("form", FORMS)
def test_loaded_layers_multiply_with_their_weights(
    model: nn.Module, tmp_path: Path, form: str
) -> None:
    tensors, truth = in_form(state(model), form)
    checkpoint = Checkpoint.open(saved(tmp_path, tensors))
    fresh = checkpoint.model()
    load(plan(checkpoint, fresh, "bf16"), fresh, Placement(torch.device("cpu")), torch.float32)
    for module, layer in quant_linears(fresh).items():
        x = torch.randn(3, truth[module].shape[1], generator=torch.Generator().manual_seed(1))
        expected = F.linear(x, truth[module], tensors[f"{module}.bias"].float())
        assert (layer(x) - expected).norm() < 1e-5 * expected.norm(), module


def test_layers_of_all_formats_may_stand_in_one_file(model: nn.Module, tmp_path: Path) -> None:
    tensors, truth = in_form(state(model), *FORMS)
    checkpoint = Checkpoint.open(saved(tmp_path, tensors))
    for module, expected in truth.items():
        assert torch.equal(checkpoint.weight(module), expected), module
    assert len(checkpoint.report.schemes()) == 7
    fresh = checkpoint.model()
    load(plan(checkpoint, fresh), fresh, Placement(torch.device("cpu")), torch.float32)


def test_bf16_holds_the_decoded_weights(model: nn.Module, tmp_path: Path) -> None:
    tensors, truth = in_form(state(model), *FORMS)
    mezzotint.convert(saved(tmp_path / "in", tensors), tmp_path / "out", to="bf16")
    written = Checkpoint.open(tmp_path / "out")
    for module, expected in truth.items():
        assert torch.equal(written.tensor(f"{module}.weight"), expected.bfloat16()), module


def test_an_older_marker_and_notes_may_stand_in_one_file(model: nn.Module, tmp_path: Path) -> None:
    tensors, truth = in_form(state(model), "convrot", "w4a8")
    for name in (QUERY, "transformer_blocks.0.attn.to_k"):
        for key in [key for key in tensors if key.startswith(f"{name}.weight_")]:
            del tensors[key]
        del tensors[f"{name}.comfy_quant"]
        codes = model.get_parameter(f"{name}.weight").float().to(torch.float8_e4m3fn)
        tensors |= {f"{name}.weight": codes, f"{name}.scale_weight": torch.tensor(0.5)}
        truth[name] = codes.float() * 0.5
    checkpoint = Checkpoint.open(saved(tmp_path, tensors | {"scaled_fp8": torch.zeros(1)}))
    for module, expected in truth.items():
        assert torch.equal(checkpoint.weight(module), expected), module
    assert checkpoint.report.schemes().keys() == {"fp8", "int8", "w4a8"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("input_scale", ["scale_input", "input_scale", None])
def test_scaled_fp8_is_read_in_all_spellings(
    model: nn.Module, tmp_path: Path, dtype: torch.dtype, scale: str, input_scale: str | None
) -> None:
    weight = model.get_parameter(f"{QUERY}.weight").float()
    codes, number = (weight * 8).to(dtype), torch.tensor(0.125)
    tensors = state(model) | {f"{QUERY}.weight": codes, f"{QUERY}.{scale}": number}
    tensors |= {f"{QUERY}.{input_scale}": torch.tensor(0.5)} if input_scale else {}
    checkpoint = Checkpoint.open(
        saved(tmp_path, tensors | {"scaled_fp8": torch.zeros(0, dtype=dtype)})
    )
    assert torch.equal(checkpoint.weight(QUERY), codes.float() * 0.125)
    (linear,) = checkpoint.contents.linears.values()
    assert linear.scheme is (FP8 if dtype is torch.float8_e4m3fn else FP8_E5M2)
    assert linear.quantizes_activation == (linear.scheme is FP8)
    if input_scale and linear.scheme is FP8_E5M2:
        reason = "inputs of layers in this format are not quantized"
        assert checkpoint.contents.ignored[f"{QUERY}.{input_scale}"] == reason
    plan(checkpoint, checkpoint.model())


def changed(tensors: Tensors, **said: object) -> Tensors:
    note = json.loads(bytes(tensors[f"{QUERY}{MARKER}"].tolist())) | said
    return tensors | {f"{QUERY}{MARKER}": marker(note)}


@pytest.mark.parametrize(
    ("form", "said", "error", "message"),
    [
        ("convrot", {"hadamard": "sylvester"}, UnreadFormat, "'hadamard' in its metadata"),
        ("convrot", {"convrot": 1}, UnreadFormat, "convrot 1 in its metadata"),
        ("convrot", {"convrot_groupsize": "64"}, UnreadFormat, "convrot_groupsize '64'"),
        ("convrot", {"convrot_groupsize": 32}, UnreadFormat, "not a power of four"),
        ("convrot", {"convrot_groupsize": 256}, ShapeMismatch, "a multiple of convrot_groupsize"),
        ("convrot", {"params": [1]}, UnreadFormat, r"params \[1\]"),
        ("convrot", {"orig_shape": [64, 65]}, ShapeMismatch, r"metadata states \[64, 65\]"),
        ("w4a4", {"linear_dtype": "fp4"}, UnreadFormat, "linear_dtype 'fp4'"),
        ("w4a8", {"group_size": 32}, ShapeMismatch, "32 columns share a scale"),
        ("w4a8", {"group_size": 48}, UnreadFormat, "group_size 48"),
        ("awq", {"group_size": 32}, UnreadFormat, "group_size 32, expected 64"),
        ("e5m2", {"convrot": True}, UnreadFormat, "float8_e5m2 with convrot"),
        ("int8", {"format": ["nvfp4"]}, UnreadFormat, "format .*nvfp4"),
    ],
)
def test_an_unknown_key_or_value_is_refused_by_name(
    model: nn.Module,
    tmp_path: Path,
    form: str,
    said: dict[str, object],
    error: type[MezzotintError],
    message: str,
) -> None:
    tensors, _ = stored_layer(QUERY, model.get_parameter(f"{QUERY}.weight"), form)
    with pytest.raises(error, match=message) as caught:
        Checkpoint.open(saved(tmp_path, state(model) | changed(tensors, **said)))
    assert QUERY in caught.value.message


def test_keys_of_other_tools_that_change_nothing_are_known(
    model: nn.Module, tmp_path: Path
) -> None:
    tensors, truth = stored_layer(QUERY, model.get_parameter(f"{QUERY}.weight"), "convrot")
    said = {"per_row": True, "orig_dtype": "torch.bfloat16", "orig_shape": [64, 64]}
    tensors = state(model) | changed(tensors, **said)
    assert torch.equal(Checkpoint.open(saved(tmp_path, tensors)).weight(QUERY), truth)


@pytest.mark.parametrize("nested", [True, False])
def test_a_note_may_nest_its_parameters(model: nn.Module, tmp_path: Path, nested: bool) -> None:
    tensors, truth = stored_layer(QUERY, model.get_parameter(f"{QUERY}.weight"), "convrot")
    said = {"convrot": True, "convrot_groupsize": 64}
    note = {"format": "int8_tensorwise", "params": said} if nested else said
    tensors = state(model) | tensors | {f"{QUERY}{MARKER}": marker(note)}
    assert torch.equal(Checkpoint.open(saved(tmp_path, tensors)).weight(QUERY), truth)


def test_the_header_and_a_marker_may_not_contradict_each_other(
    model: nn.Module, tmp_path: Path
) -> None:
    tensors, truth = stored_layer(QUERY, model.get_parameter(f"{QUERY}.weight"), "convrot")

    def opened(**said: object) -> Checkpoint:
        metadata = {"_quantization_metadata": json.dumps({"layers": {QUERY: said}})}
        return Checkpoint.open(saved(tmp_path, state(model) | tensors, metadata))

    assert torch.equal(opened(format="int8_tensorwise").weight(QUERY), truth)
    with pytest.raises(BrokenFile, match=r"has 'convrot' True, and .* in the header has False"):
        opened(format="int8_tensorwise", convrot=False)


@pytest.mark.parametrize("form", ["convrot", "w4a4", "w4a8"])
def test_full_precision_leaves_inputs_of_any_format_alone(
    model: nn.Module, tmp_path: Path, form: str
) -> None:
    tensors, _ = stored_layer(QUERY, model.get_parameter(f"{QUERY}.weight"), form)
    whole = state(model)
    (linear,) = Checkpoint.open(saved(tmp_path / "q", whole | tensors)).contents.linears.values()
    assert linear.quantizes_activation
    tensors = whole | changed(tensors, full_precision_matrix_mult=True)
    checkpoint = Checkpoint.open(saved(tmp_path / "f", tensors))
    (linear,) = checkpoint.contents.linears.values()
    assert not linear.quantizes_activation
    mezzotint.convert(tmp_path / "f/model.safetensors", tmp_path / "mz", to="mezzotint")
    (linear,) = Checkpoint.open(tmp_path / "mz").contents.linears.values()
    assert not linear.quantizes_activation


def test_asymmetric_w4a8_is_refused_by_name(model: nn.Module, tmp_path: Path) -> None:
    tensors, _ = stored_layer(QUERY, model.get_parameter(f"{QUERY}.weight"), "w4a8")
    tensors |= state(model) | tensors | {f"{QUERY}.weight_correction": torch.zeros(4, 64)}
    with pytest.raises(UnreadFormat, match="its codes are asymmetric"):
        Checkpoint.open(saved(tmp_path, tensors))


def test_another_rotation_than_comfyuis_is_not_written(model: nn.Module, tmp_path: Path) -> None:
    tensors, _ = in_form(state(model), "convrot")
    mezzotint.convert(saved(tmp_path / "in", tensors), tmp_path / "mz", to="mezzotint")
    file = tmp_path / "mz/diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    stored[f"{QUERY}.rotation"] = stored[f"{QUERY}.rotation"].flip(0).contiguous()
    save_file(stored, file)
    with pytest.raises(MezzotintError, match="rotated by another matrix"):
        mezzotint.convert(tmp_path / "mz", tmp_path / "back.safetensors", to="comfy")
    assert not (tmp_path / "back.safetensors").exists()


def test_w4a4_without_a_scale_of_each_row_is_a_wrong_shape(
    model: nn.Module, tmp_path: Path
) -> None:
    tensors, _ = stored_layer(QUERY, model.get_parameter(f"{QUERY}.weight"), "w4a4")
    tensors[f"{QUERY}.weight_scale"] = torch.tensor(1.0)
    file = saved(tmp_path, state(model) | tensors)
    assert any("expected [64]" in problem for problem in inspect(file).problems)
    assert Checkpoint.open(file).contents.linears[QUERY].scheme is INT4_ROWS


@pytest.mark.parametrize("byte", [0x7C, 0xFD])
def test_e5m2_codes_that_are_not_finite_are_broken(
    model: nn.Module, tmp_path: Path, byte: int
) -> None:
    tensors, _ = stored_layer(QUERY, model.get_parameter(f"{QUERY}.weight"), "e5m2")
    tensors[f"{QUERY}.weight"].view(torch.uint8)[3, 5] = byte
    report = mezzotint.verify(saved(tmp_path, state(model) | tensors))
    assert any("not finite" in finding.message for finding in report.findings)
    assert report.exit_code == 2


def test_loaded_layers_share_no_memory(model: nn.Module, tmp_path: Path) -> None:
    """safetensors refuses to save tensors that do."""
    tensors, truth = in_form(state(model), "convrot")
    checkpoint = Checkpoint.open(saved(tmp_path / "in", tensors))
    fresh = checkpoint.model()
    load(plan(checkpoint, fresh), fresh, Placement(torch.device("cpu")), torch.bfloat16)
    layers = quant_linears(fresh).values()
    rotations = {layer.get_buffer("rotation").data_ptr() for layer in layers}
    assert len(rotations) == len(truth)
