"""Golden checkpoints as models: layers under diffusers' names, and whole transformers in float32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from golden import expected_modules
from mezzotint.checkpoint import Checkpoint
from mezzotint.loading import LoadReport, load, plan
from mezzotint.nn import quant_linears
from mezzotint.pipelines import meta_model

FLUX2_DEV = {
    "_class_name": "Flux2Transformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 96,
    "mlp_ratio": 3.0,
    "num_attention_heads": 1,
    "num_layers": 1,
    "num_single_layers": 1,
    "timestep_guidance_channels": 128,
}
KLEIN = FLUX2_DEV | {
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 8, 8, 8],
    "guidance_embeds": False,
    "in_channels": 32,
    "joint_attention_dim": 48,
    "num_attention_heads": 2,
    "num_single_layers": 2,
    "timestep_guidance_channels": 64,
}
"""The configurations of the models that the cases were made from: these files come without one."""

DEV = "bfl_flux2dev_nvfp4/checkpoint/flux2-dev-nvfp4"
SINGLE_FILES = {
    f"{DEV}.safetensors": (FLUX2_DEV, "bfl_flux2dev_nvfp4/expected.safetensors"),
    f"{DEV}-mixed.safetensors": (FLUX2_DEV, "bfl_flux2dev_nvfp4/expected_mixed.safetensors"),
    "bfl_flux2klein_fp8/checkpoint/flux-2-klein-4b-fp8.safetensors": (KLEIN, "bfl_flux2klein_fp8/expected.safetensors"),
    "comfy_qwenimage_mixed_nvfp4_fp8/checkpoint/qwen-image-mixed.safetensors": (
        "base/qwenimage/config.json",
        "comfy_qwenimage_mixed_nvfp4_fp8/expected.safetensors",
    ),
}


def loaded(
    checkpoint: Checkpoint, config: dict[str, Any], dtype: torch.dtype, activations: str
) -> tuple[nn.Module, LoadReport]:
    model = meta_model(config["_class_name"], config)
    report = load(plan(checkpoint, model, activations), model, torch.device("cpu"), dtype)
    return model.eval(), report


def config_of(data: Path, config: Any) -> dict[str, Any]:

    return config if isinstance(config, dict) else json.loads((data / config).read_text())


@pytest.mark.parametrize("file", SINGLE_FILES)
def test_layers_have_diffusers_names_and_the_golden_weights(data: Path, file: str) -> None:
    expected = load_file(data / SINGLE_FILES[file][1])
    checkpoint = Checkpoint.open(data / file)
    assert checkpoint.modules == sorted(expected_modules(expected))
    for module in checkpoint.modules:
        weight = checkpoint.weight(module)
        assert torch.equal(weight[expected[f"{module}.rows"]], expected[f"{module}.dequantized"]), module


@pytest.mark.parametrize("file", SINGLE_FILES)
def test_single_files_load_and_give_the_golden_products(data: Path, file: str) -> None:
    config, case = SINGLE_FILES[file]
    expected = load_file(data / case)
    model, report = loaded(Checkpoint.open(data / file), config_of(data, config), torch.float32, "bf16")
    for name, layer in quant_linears(model).items():
        y = layer(expected[f"{name}.x"].float())
        assert torch.linalg.norm(y - expected[f"{name}.y"]) <= 2e-6 * torch.linalg.norm(expected[f"{name}.y"]), name
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert report.evidence


def test_a_missing_input_scale_is_an_event(data: Path) -> None:
    file = data / f"{DEV}-mixed.safetensors"
    _, report = loaded(Checkpoint.open(file), FLUX2_DEV, torch.bfloat16, "as_stored")
    assert "2 quantized layers have no input scale in the file; theirs is computed at each call" in report.events
    lent = Checkpoint.open(file, scales_from=data / f"{DEV}.safetensors")
    _, report = loaded(lent, FLUX2_DEV, torch.bfloat16, "as_stored")
    assert not any("no input scale" in event for event in report.events)
    assert any(event.startswith("2 input scales are taken from") for event in report.events)


def wan(inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value if name == "timestep" else value.float() for name, value in inputs.items()}


def zimage(inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {"x": [inputs["x0"].float()], "t": inputs["t"].float(), "cap_feats": [inputs["cap0"].float()]}


@pytest.mark.parametrize(("case", "arguments"), [("modelopt_wan_fp8", wan), ("modelopt_zimage_nvfp4svd", zimage)])
def test_whole_models_in_float32_equal_the_golden_ones(data: Path, case: str, arguments: Any) -> None:
    checkpoint = Checkpoint.open(data / case / "checkpoint")
    model, _ = loaded(checkpoint, dict(checkpoint.header.config), torch.float32, "bf16")
    with torch.no_grad():
        (output, *_) = model(**arguments(load_file(data / case / "inputs.safetensors")), return_dict=False)
    output = output[0] if isinstance(output, list) else output
    expected = load_file(data / case / "outputs.safetensors")["dequantized_weights_fp32"]
    assert torch.linalg.norm(output - expected) <= 1e-5 * torch.linalg.norm(expected)
