"""ModelOpt's exports in every variant: golden values, effective weights, and configurations."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mezzotint
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import BadScale, MissingTensor, ShapeMismatch, UnexpectedTensor, UnknownFormat
from mezzotint.families.building import build_meta_model
from mezzotint.loading import plan, report
from mezzotint.nn import quant_linears
from mezzotint.schemes import BF16, INT8, NVFP4
from support.checkpoint_edits import load_flux, rewrite, run_flux
from support.golden_files import FLOAT, opened, plain_parts

SVD = "modelopt_flux1_nvfp4svd"


@pytest.mark.parametrize(("case", "transformed"), [(SVD, 10), ("modelopt_zimage_nvfp4svd", 6)])
def test_low_rank_parts_come_under_their_own_names(data: Path, case: str, transformed: int) -> None:
    expected = load_file(data / case / "expected.safetensors")
    weights = plain_parts(data / case / "checkpoint")
    assert sum(weight.scheme is BF16 for weight in weights.values()) == transformed
    for name, weight in weights.items():
        assert torch.equal(weight.parts["lora_down"], expected[f"{name}.proj_down"])
        assert torch.equal(weight.parts["lora_up"], expected[f"{name}.proj_up"])
        assert torch.equal(weight.parts["pre_quant_scale"], expected[f"{name}.pre_quant_scale"])


def test_layers_left_in_bf16_get_their_effective_weights(data: Path) -> None:
    model = load_flux(data / SVD / "checkpoint", torch.float32)
    assert len(quant_linears(model)) == 20
    expected = load_file(data / SVD / "expected.safetensors")
    assert type(model.proj_out) is torch.nn.Linear
    wanted = expected["proj_out.dequantized"]
    got = model.proj_out.weight[expected["proj_out.rows"]]
    assert torch.linalg.norm(got - wanted) <= FLOAT * torch.linalg.norm(wanted)


def test_the_report_names_the_transformed_layers(data: Path) -> None:
    checkpoint = Checkpoint.open(data / SVD / "checkpoint")
    model = build_meta_model("FluxTransformer2DModel", checkpoint.header.config)
    events = report(plan(checkpoint, model), model).events
    assert any(event.startswith("10 BF16 layers are stored transformed") for event in events)


def test_float32_forward_equals_the_golden_one(data: Path) -> None:
    inputs = load_file(data / "base/flux1_inputs.safetensors")
    expected = load_file(data / SVD / "outputs.safetensors")["dequantized_weights_fp32"]
    output = run_flux(
        load_flux(data / SVD / "checkpoint", torch.float32, activations="bf16"),
        inputs,
        torch.float32,
    )
    assert torch.linalg.norm(output - expected) <= 1e-5 * torch.linalg.norm(expected)


@pytest.fixture
def svd(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data / SVD / "checkpoint", tmp_path / "svd"))


@pytest.mark.parametrize("layer", ["proj_out", "transformer_blocks.0.attn.to_q"])
def test_half_of_a_low_rank_pair_is_not_enough(svd: Path, layer: str) -> None:
    rewrite(svd, lambda tensors: tensors.pop(f"{layer}.svdquant_lora_b"))
    header, contents = opened(svd)
    with pytest.raises(MissingTensor, match=rf"{layer}\.svdquant_lora_b is not there"):
        contents.linears[layer].check(header)


@pytest.mark.parametrize("suffix", ["pre_quant_scale", "svdquant_lora_a", "input_scale"])
def test_what_the_algorithm_calls_for_is_missed(svd: Path, suffix: str) -> None:
    key = f"transformer_blocks.0.attn.to_q.{suffix}"
    rewrite(svd, lambda tensors: tensors.pop(key))
    header, contents = opened(svd)
    with pytest.raises(MissingTensor, match=f"{suffix} is not there"):
        contents.linears[key.rpartition(".")[0]].check(header)


def test_an_input_scale_of_a_bf16_weight_is_unclaimed(svd: Path) -> None:
    rewrite(svd, lambda tensors: tensors.update({"proj_out.input_scale": torch.tensor(2.0)}))
    with pytest.raises(UnexpectedTensor, match=r"proj_out\.input_scale is left over"):
        load_flux(svd)


def test_a_low_rank_part_of_the_wrong_width_is_an_error(svd: Path) -> None:
    rewrite(
        svd,
        lambda tensors: tensors.update(
            {"proj_out.svdquant_lora_a": torch.zeros(16, 64).bfloat16()}
        ),
    )
    header, contents = opened(svd)
    with pytest.raises(ShapeMismatch, match=r"proj_out\.svdquant_lora_a"):
        contents.linears["proj_out"].check(header)


def nested(folder: Path, algo: str) -> None:
    """Move the quantization out of config.json, into ModelOpt's nested file."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    declared = {"quant_algo": algo, "exclude_modules": ["proj_out"], "kv_cache_quant_algo": None}
    declaration = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": declared}
    (folder / "hf_quant_config.json").write_text(json.dumps(declaration))


def test_the_nested_declaration_is_read(nvfp4: Path) -> None:
    flat = opened(nvfp4)[1]
    nested(nvfp4, "NVFP4")
    assert opened(nvfp4)[1].linears == flat.linears


def test_a_false_nested_declaration_names_the_file(nvfp4: Path) -> None:
    nested(nvfp4, "FP8")
    with pytest.raises(
        UnknownFormat, match=r"hf_quant_config\.json declares FP8, and the tensors are NVFP4"
    ):
        opened(nvfp4)


def test_two_declarations_must_agree(nvfp4: Path) -> None:
    (nvfp4 / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(
        UnknownFormat, match=r"config\.json declares NVFP4 and hf_quant_config\.json declares FP8"
    ):
        opened(nvfp4)


@pytest.mark.parametrize("value", [None, [1], "text"])
@pytest.mark.parametrize("key", ["config_groups", "ignore", "producer"])
def test_what_is_of_no_use_in_a_declaration_says_nothing(
    nvfp4: Path, key: str, value: object
) -> None:
    unchanged = opened(nvfp4)[1]
    declare(nvfp4, {key: value})
    assert opened(nvfp4)[1].linears == unchanged.linears


def declare(folder: Path, entries: dict[str, object]) -> None:
    """Change entries of the quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= entries
    (folder / "config.json").write_text(json.dumps(config))


def test_a_group_without_quantized_inputs_may_say_so_by_null(nvfp4: Path) -> None:
    unchanged = opened(nvfp4)[1]
    declare(nvfp4, {"config_groups": {"group_0": {"input_activations": None}, "group_1": None}})
    assert opened(nvfp4)[1].linears == unchanged.linears


def test_parts_without_their_weight_are_named_without_a_config_of_the_model(nvfp4: Path) -> None:
    """Without the check, the layer's other parts would count as unquantized tensors."""
    layer = "transformer_blocks.0.attn.to_q"
    rewrite(nvfp4, lambda tensors: tensors.pop(f"{layer}.weight"))
    config = json.loads((nvfp4 / "config.json").read_text())
    del config["_class_name"]
    (nvfp4 / "config.json").write_text(json.dumps(config))
    problem = f"{layer}.weight_scale belongs to no quantized layer; {layer} has no weight"
    assert any(problem in missing for missing in mezzotint.inspect(nvfp4).problems)
    findings = mezzotint.verify(nvfp4).findings
    assert any(finding.severity == 2 and problem in finding.message for finding in findings)


def test_codes_that_are_no_matrix_are_an_error(nvfp4: Path) -> None:
    layer = "transformer_blocks.0.attn.to_q"

    def deepen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"][None].clone()

    rewrite(nvfp4, deepen)
    header, contents = opened(nvfp4)
    with pytest.raises(
        ShapeMismatch, match=rf"{layer}\.weight has shape \[1, 128, 64\], expected a matrix"
    ):
        contents.linears[layer].check(header)


def test_the_producer_replaces_a_missing_method(nvfp4: Path) -> None:
    config = json.loads((nvfp4 / "config.json").read_text())
    del config["quantization_config"]["quant_method"]
    (nvfp4 / "config.json").write_text(json.dumps(config))
    assert len(opened(nvfp4)[1].linears) == 20


def test_an_algorithm_that_is_no_word_is_refused(nvfp4: Path) -> None:
    declare(nvfp4, {"quant_algo": ["NVFP4"]})
    with pytest.raises(
        UnknownFormat, match=r"quant_algo \['NVFP4'\] of ModelOpt is not one of FP8, NVFP4"
    ):
        opened(nvfp4)


def test_the_nested_file_need_not_name_its_producer(nvfp4: Path) -> None:
    nested(nvfp4, "NVFP4")
    (nvfp4 / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "NVFP4"}})
    )
    assert len(opened(nvfp4)[1].linears) == 20


def test_a_low_rank_pair_of_two_ranks_is_an_error(svd: Path) -> None:
    layer = "transformer_blocks.0.attn.to_q"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{layer}.svdquant_lora_a"] = tensors[f"{layer}.svdquant_lora_a"][:4].clone()

    rewrite(svd, cut)
    header, contents = opened(svd)
    with pytest.raises(
        ShapeMismatch, match=rf"{layer}\.svdquant_lora_a has rank 4, expected \d+ as in {layer}"
    ):
        contents.linears[layer].check(header)


def test_a_factor_of_zero_is_an_error(svd: Path) -> None:
    key = "transformer_blocks.0.attn.to_q.pre_quant_scale"

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][3] = 0

    rewrite(svd, zero)
    with pytest.raises(BadScale, match=rf"{key} holds 0, expected a positive number"):
        Checkpoint.open(svd).weight("transformer_blocks.0.attn.to_q")


def test_an_algorithm_that_is_not_known_is_refused(nvfp4: Path) -> None:
    nested(nvfp4, "W4A8_AWQ")
    with pytest.raises(
        UnknownFormat, match="quant_algo 'W4A8_AWQ' of ModelOpt is not one of FP8, NVFP4"
    ):
        opened(nvfp4)


def test_weight_only_layers_need_no_input_scale(nvfp4: Path) -> None:
    rewrite(
        nvfp4,
        lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith("input_scale")],
    )
    nested(nvfp4, "W4A16_NVFP4")
    header, contents = opened(nvfp4)
    for linear in contents.linears.values():
        linear.check(header)
        assert linear.scheme is NVFP4
        assert not linear.quantizes_activation


ORACLE_LAYER = "transformer_blocks.0.ff.net.0.proj"
VARIANTS = {
    "modelopt_int8": (INT8, 0.006),
    "modelopt_w4a16": (NVFP4, 0.12),
    "modelopt_awq": (NVFP4, 0.12),
}
"""{export: (scheme, its relative error)}; a wrong reading has ten times the error."""


@pytest.mark.parametrize("case", VARIANTS)
def test_every_algorithm_is_close_to_its_source_weights(data: Path, case: str) -> None:
    scheme, error = VARIANTS[case]
    weight = plain_parts(data / "oracles" / case)[ORACLE_LAYER]
    assert weight.scheme is scheme
    assert (
        weight.quantizes_activation
        == ("pre_quant_scale" in weight.parts)
        == (case != "modelopt_w4a16")
    )
    base = load_file(data / f"oracles/{case}_samples.safetensors")["base"].float()
    decoded = weight.scheme.dequantize(weight.parts)
    assert torch.linalg.norm(decoded - base) <= error * torch.linalg.norm(base)


def test_int8_outputs_equal_modelopts_simulation(data: Path) -> None:
    """The tolerance is 1e-3, because ModelOpt simulates with smoothed weights in BF16."""
    samples = load_file(data / "oracles/modelopt_int8_samples.safetensors")
    weight = plain_parts(data / "oracles/modelopt_int8")[ORACLE_LAYER]
    y = INT8.linear(samples["x"], weight.parts, quantize=True) + weight.parts["bias"].float()
    assert torch.linalg.norm(y - samples["y"]) <= 1e-3 * torch.linalg.norm(samples["y"])
