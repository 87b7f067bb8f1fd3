"""Conversions: equal payload bytes, named transforms, and errors before anything is written."""

import json
from pathlib import Path

import comfy_kitchen
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mezzotint
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import BadRequest, BadScale, MissingTensor, Unsupported
from mezzotint.layouts import from_tiles
from mezzotint.nn import quant_linears
from support.checkpoint_edits import WEIGHTS, load_flux, rewrite, run_flux
from support.merge_pipelines import LAYER, pipeline_around


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))
    )


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def same_payloads(one: Path, other: Path) -> None:
    """Every layer's parts and every plain tensor of two checkpoints are the same, to the byte."""
    a, b = Checkpoint.open(one), Checkpoint.open(other)
    assert set(a.modules) == set(b.modules)
    for module in a.modules:
        parts, others = a.parts(module), b.parts(module)
        assert set(parts) == set(others)
        assert all(same_bytes(parts[name], others[name]) for name in parts), module
    assert set(a.plain) == set(b.plain)
    assert all(same_bytes(a.tensor(name), b.tensor(name)) for name in a.plain)


def test_modelopt_to_mezzotint_to_comfy_and_back_keeps_every_payload_byte(
    nvfp4: Path, tmp_path: Path
) -> None:
    steps = {
        "mz": "mezzotint",
        "c.safetensors": "comfy",
        "mz2": "mezzotint",
        "mo": "modelopt",
        "mz3": "mezzotint",
    }
    source = nvfp4
    for name, to in steps.items():
        report = mezzotint.convert(source, tmp_path / name, to=to)
        assert not report.transforms
        assert report.layers == {"nvfp4": 20}
        same_payloads(nvfp4, tmp_path / name)
        source = tmp_path / name


def test_modelopts_own_tensors_come_back_byte_for_byte(
    nvfp4: Path, fp8: Path, tmp_path: Path
) -> None:
    for source in (nvfp4, fp8):
        mezzotint.convert(source, tmp_path / source.name / "mz")
        mezzotint.convert(
            tmp_path / source.name / "mz", tmp_path / source.name / "mo", to="modelopt"
        )
        ours, theirs = (load_file(f / WEIGHTS) for f in (tmp_path / source.name / "mo", source))
        assert ours.keys() == theirs.keys()
        assert all(same_bytes(ours[key], theirs[key]) for key in theirs)
        configs = [
            json.loads((f / "config.json").read_text())
            for f in (tmp_path / source.name / "mo", source)
        ]
        declared, original = (config["quantization_config"] for config in configs)
        assert {k: declared[k] for k in ("quant_algo", "quant_method")} == {
            k: original[k] for k in ("quant_algo", "quant_method")
        }
        assert declared["config_groups"] == original["config_groups"]


@pytest.mark.parametrize("activations", ["as_stored", "bf16"])
def test_a_converted_model_computes_the_same(
    nvfp4: Path, data: Path, tmp_path: Path, activations: str
) -> None:
    mezzotint.convert(nvfp4, tmp_path / "mz", shard_bytes=300_000)
    inputs = load_file(data / "base/flux1_inputs.safetensors")
    one, other = (
        run_flux(load_flux(f, activations=activations), inputs, torch.bfloat16)
        for f in (nvfp4, tmp_path / "mz")
    )
    assert torch.equal(one, other)


def test_diffusers_reads_mezzotints_shards(nvfp4: Path, data: Path, tmp_path: Path) -> None:
    mezzotint.convert(nvfp4, tmp_path / "mz", shard_bytes=300_000)
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "mz", torch_dtype=torch.bfloat16)
    assert len(quant_linears(model)) == 20
    inputs = load_file(data / "base/flux1_inputs.safetensors")
    assert torch.equal(
        run_flux(model, inputs, torch.bfloat16), run_flux(load_flux(nvfp4), inputs, torch.bfloat16)
    )


def test_comfy_kitchen_decodes_what_is_written_for_comfy(
    nvfp4: Path, data: Path, tmp_path: Path
) -> None:
    mezzotint.convert(nvfp4, tmp_path / "comfy", to="comfy")
    stored = load_file(tmp_path / "comfy.safetensors")
    expected = load_file(data / "modelopt_flux1_nvfp4/expected.safetensors")
    weights = comfy_kitchen.dequantize_nvfp4(
        stored[f"{LAYER}.weight"],
        stored[f"{LAYER}.weight_scale_2"],
        stored[f"{LAYER}.weight_scale"],
        torch.float32,
    )
    rows = expected.get(f"{LAYER}.rows", torch.arange(128))
    assert torch.equal(weights[rows], expected[f"{LAYER}.dequantized"])


def test_comfys_notes_and_bytes(nvfp4: Path, tmp_path: Path) -> None:
    mezzotint.convert(nvfp4, tmp_path / "comfy.safetensors", to="comfy")
    before = load_file(nvfp4 / WEIGHTS)
    with safe_open(tmp_path / "comfy.safetensors", framework="pt") as opened:
        notes = json.loads(opened.metadata()["_quantization_metadata"])["layers"]
        marker = bytes(opened.get_tensor(f"{LAYER}.comfy_quant").tolist())
        codes, tiles = (opened.get_tensor(f"{LAYER}.{name}") for name in ("weight", "weight_scale"))
        assert json.loads(opened.metadata()["config"])["_class_name"] == "FluxTransformer2DModel"
    assert notes[LAYER] == json.loads(marker) == {"format": "nvfp4"}
    swapped = before[f"{LAYER}.weight"]
    assert torch.equal(codes, (swapped >> 4) | (swapped << 4))
    assert same_bytes(from_tiles(tiles, 128, 8), before[f"{LAYER}.weight_scale"])


def test_a_comfy_file_carries_its_configuration(nvfp4: Path, tmp_path: Path) -> None:
    mezzotint.convert(nvfp4, tmp_path / "comfy", to="comfy")
    mezzotint.convert(tmp_path / "comfy.safetensors", tmp_path / "mz")
    assert (
        json.loads((tmp_path / "mz/config.json").read_text())["_class_name"]
        == "FluxTransformer2DModel"
    )


def test_bf16_is_the_decoded_weights_rounded_once(nvfp4: Path, tmp_path: Path) -> None:
    report = mezzotint.convert(nvfp4, tmp_path / "bf16", to="bf16")
    assert report.transforms == {"decoded to BF16": 20}
    source, written = Checkpoint.open(nvfp4), Checkpoint.open(tmp_path / "bf16")
    assert written.detected.format.name == "plain"
    for module in source.modules:
        assert torch.equal(written.tensor(f"{module}.weight"), source.weight(module).bfloat16()), (
            module
        )
    config = json.loads((tmp_path / "bf16/config.json").read_text())
    assert "quantization_config" not in config
    FluxTransformer2DModel.from_pretrained(tmp_path / "bf16", torch_dtype=torch.bfloat16)


@pytest.mark.parametrize("with_base", [True, False])
def test_layers_kept_in_bf16_come_from_the_base_or_are_decoded(
    nvfp4: Path, data: Path, tmp_path: Path, with_base: bool
) -> None:
    base = data / "base/flux1"
    report = mezzotint.convert(
        nvfp4, tmp_path / "mz", keep_bf16=["*.ff.net.*"], base=base if with_base else None
    )
    ((transform, layers),) = report.transforms.items()
    assert layers == 2
    assert ("from" in transform) == with_base
    written, source = Checkpoint.open(tmp_path / "mz"), Checkpoint.open(nvfp4)
    assert len(written.modules) == 18
    for module in set(source.modules) - set(written.modules):
        expected = (
            Checkpoint.open(base).tensor(f"{module}.weight")
            if with_base
            else source.weight(module).bfloat16()
        )
        assert torch.equal(written.tensor(f"{module}.weight"), expected)


def test_a_glob_that_names_nothing_is_an_error(nvfp4: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"'nothing\*' matches no quantized layer"):
        mezzotint.convert(nvfp4, tmp_path / "mz", keep_bf16=["nothing*"])


def test_missing_input_scales_come_from_the_full_file(
    nvfp4: Path, data: Path, tmp_path: Path
) -> None:
    rewrite(nvfp4, lambda tensors: tensors.pop(f"{LAYER}.input_scale"))
    full = data / "modelopt_flux1_nvfp4/checkpoint"
    with pytest.raises(MissingTensor, match="input_scale"):
        mezzotint.convert(nvfp4, tmp_path / "mz")
    report = mezzotint.convert(nvfp4, tmp_path / "mz", scales_from=full)
    assert report.notes == (f"1 input scales are taken from {full}",)
    same_payloads(full, tmp_path / "mz")


def test_a_target_that_cannot_hold_a_layer_refuses_before_writing(
    nvfp4: Path, tmp_path: Path
) -> None:
    def low_rank(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.proj_down"] = torch.zeros(4, 128, dtype=torch.bfloat16)
        tensors[f"{LAYER}.proj_up"] = torch.zeros(128, 4, dtype=torch.bfloat16)

    mezzotint.convert(nvfp4, tmp_path / "mz")
    rewrite(tmp_path / "mz", low_rank)
    config = json.loads((tmp_path / "mz/config.json").read_text())
    layers = config["quantization_config"]["layers"]
    shape = layers[0]["modules"].pop(LAYER)
    layers.append(
        {
            "scheme": "nvfp4",
            "parts": [*layers[0]["parts"], "proj_down", "proj_up"],
            "modules": {LAYER: shape},
        }
    )
    (tmp_path / "mz/config.json").write_text(json.dumps(config))
    for to in ("comfy", "modelopt"):
        with pytest.raises(
            Unsupported, match=rf"{LAYER}: has proj_down and proj_up .* which .* cannot store"
        ):
            mezzotint.convert(tmp_path / "mz", tmp_path / "out", to=to)
    assert not list(tmp_path.glob("*out*"))
    mezzotint.convert(tmp_path / "mz", tmp_path / "again")
    same_payloads(tmp_path / "mz", tmp_path / "again")


def test_mixed_schemes_have_no_place_in_modelopt(nvfp4: Path, fp8: Path, tmp_path: Path) -> None:
    file = tmp_path / "mixed.safetensors"
    mezzotint.convert(nvfp4, file, to="comfy")
    tensors = {
        key: value for key, value in load_file(file).items() if key.rpartition(".")[0] != LAYER
    }
    tensors |= {
        key: value
        for key, value in load_file(fp8 / WEIGHTS).items()
        if key.rpartition(".")[0] == LAYER
    }
    tensors[f"{LAYER}.comfy_quant"] = torch.tensor(
        list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8
    )
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(Unsupported, match=r"the layers are FP8 \(e4m3\) and NVFP4"):
        mezzotint.convert(file, tmp_path / "mo", to="modelopt")
    assert mezzotint.convert(file, tmp_path / "mz").layers == {"nvfp4": 19, "fp8": 1}
    mezzotint.convert(tmp_path / "mz", tmp_path / "again.safetensors", to="comfy")
    same_payloads(file, tmp_path / "again.safetensors")


def test_whether_inputs_are_quantized_survives(nvfp4: Path, tmp_path: Path) -> None:
    """ComfyUI rounds inputs without a static scale; ModelOpt's W4A16 leaves them alone."""

    def drop_scales(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(".input_scale")]:
            del tensors[key]

    rewrite(nvfp4, drop_scales)
    config = json.loads((nvfp4 / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "W4A16_NVFP4"
    (nvfp4 / "config.json").write_text(json.dumps(config))
    mezzotint.convert(nvfp4, tmp_path / "comfy", to="comfy")
    mezzotint.convert(tmp_path / "comfy.safetensors", tmp_path / "mz")
    assert not any(
        piece.quantizes_activation for piece in Checkpoint.open(tmp_path / "mz").read(LAYER)
    )
    config = json.loads((tmp_path / "mz/config.json").read_text())
    config["quantization_config"]["layers"][0]["dynamic_input"] = True
    (tmp_path / "mz/config.json").write_text(json.dumps(config))
    mezzotint.convert(tmp_path / "mz", tmp_path / "comfy2", to="comfy")
    mezzotint.convert(tmp_path / "comfy2.safetensors", tmp_path / "mz2")
    assert all(
        piece.quantizes_activation for piece in Checkpoint.open(tmp_path / "mz2").read(LAYER)
    )
    report = mezzotint.convert(tmp_path / "mz2", tmp_path / "mo", to="modelopt")
    assert report.transforms == {
        "inputs stay unquantized, as the format has no scales computed per call": 20
    }


def test_layers_that_are_merely_transformed_are_decoded_where_the_target_has_no_place(
    data: Path, tmp_path: Path
) -> None:
    folder = data / "modelopt_flux1_nvfp4svd/checkpoint"
    report = mezzotint.convert(folder, tmp_path / "mo", to="modelopt")
    assert not report.transforms
    same_payloads(folder, tmp_path / "mo")
    mezzotint.convert(
        folder,
        tmp_path / "mz",
        keep_bf16=[m for m in Checkpoint.open(folder).modules if m != "proj_out"],
    )
    report = mezzotint.convert(tmp_path / "mz", tmp_path / "comfy", to="comfy")
    assert report.transforms == {"decoded to BF16": 1}
    written = Checkpoint.open(tmp_path / "comfy.safetensors").tensor("proj_out.weight")
    assert torch.equal(written, Checkpoint.open(folder).weight("proj_out").bfloat16())


@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0])
def test_a_scale_that_is_no_number_is_not_copied(nvfp4: Path, tmp_path: Path, value: float) -> None:
    rewrite(nvfp4, lambda tensors: tensors.update({f"{LAYER}.weight_scale_2": torch.tensor(value)}))
    with pytest.raises(BadScale, match=r"to_q\.weight_scale_2"):
        mezzotint.convert(nvfp4, tmp_path / "mz")
    assert not (tmp_path / "mz").exists()


def test_a_block_scale_that_is_no_number_is_not_copied(nvfp4: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight_scale"].view(torch.uint8)[3, 1] = 0x7F

    rewrite(nvfp4, damage)
    with pytest.raises(BadScale, match=r"to_q\.weight_scale holds a value that is not finite"):
        mezzotint.convert(nvfp4, tmp_path / "mz")


def test_a_component_of_a_pipeline_and_back_into_one(
    nvfp4: Path, data: Path, tmp_path: Path
) -> None:
    pipeline = pipeline_around(nvfp4, tmp_path / "pipeline", "transformer_2")
    mezzotint.convert(pipeline, tmp_path / "out", component="transformer_2", merge_into=pipeline)
    same_payloads(pipeline / "transformer_2", tmp_path / "out/transformer_2")
    settings = "scheduler/scheduler_config.json"
    assert (tmp_path / "out" / settings).read_bytes() == (pipeline / settings).read_bytes()
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "model_index.json",
        "scheduler",
        "transformer_2",
    ]
    assert (
        json.loads((tmp_path / "out/transformer_2/config.json").read_text())["_class_name"]
        == "FluxTransformer2DModel"
    )


def test_an_unknown_target_names_those_there_are(nvfp4: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="bf16, comfy, mezzotint, modelopt"):
        mezzotint.convert(nvfp4, tmp_path / "x", to="gguf")
