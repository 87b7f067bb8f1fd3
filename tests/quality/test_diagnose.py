"""`diagnose`: where a candidate is wrong and why, each cause, recordings, and the command."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mezzotint
from mezzotint import kernels
from mezzotint.builtin import resolve
from mezzotint.errors import BadRequest
from mezzotint.families import Sampling
from mezzotint.generation.generate import generate
from mezzotint.generation.pipeline import load, recommended_sampling
from mezzotint.generation.sampling_file import SAMPLING_FILE
from mezzotint.kernels import Can, Cannot, Target, WeightSpec
from mezzotint.layouts.nunchaku import from_vector_fragments, to_vector_fragments
from mezzotint.quality.candidate import parse_sources
from mezzotint.quality.diagnose import SCHEMA, diagnose
from mezzotint.quality.input_scales import find_input_scale_problem, input_range
from mezzotint.quality.layers import z_score
from mezzotint.quality.prompts import Prompt, read_prompts
from mezzotint.quality.recording import SAMPLE_ROWS, InputSample, record_inputs
from mezzotint.quality.sensitivity import sensitivity
from mezzotint.quality.signatures import WrongTensor, explain
from mezzotint.schemes import FP8, NVFP4, Scheme
from mezzotint.schemes.fp8 import encode_fp8
from mezzotint.schemes.nvfp4 import encode_nvfp4
from mezzotint.tensor import PLAIN, QuantTensor
from support.checkpoint_edits import rewrite
from support.cli_runner import run
from support.modelopt_exporter import export
from support.pipeline_cases import Case
from support.planted_faults import FAULTS, Fault, nibbles_swapped, plant, query_and_key_exchanged

pytestmark = pytest.mark.usefixtures("encoders_loaded_once")
CPU = torch.device("cpu")
CAUSES = {
    "nibbles swapped": "nibbles swapped",
    "scales tiled": "scales tiled",
    "input scale of 1": "input scale missing",
    "AdaLN halves swapped": "halves of AdaLN swapped",
    "a block's scales doubled": "scales off by a factor",
    "weights zeroed": "weights zeroed",
    "q and k exchanged": "q/k/v order",
    "gate and up exchanged": "gate/up order",
    "BF16 as FP8": "not quantized at all",
    "smooth vectors in fragments": "vectors in fragment order",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found_and_its_cause_named(tmp_path: Path, fault: Fault) -> None:
    diagnosis = diagnose("demo", str(plant(fault, tmp_path / "faulty")), device="cpu")
    for suspect in diagnosis.suspects[:3]:
        print(f"{fault.name}: {suspect}")
    assert diagnosis.suspects[0].module.startswith(fault.module)
    assert diagnosis.suspects[0].cause == CAUSES[fault.name]


def test_what_was_never_quantized_comes_before_its_layers(tmp_path: Path) -> None:
    """BF16 weights, decoded from FP8, have a small error each, and the file claims to be FP8."""
    faulty = plant(Fault("decoded", "bf16", "", lambda tensors, _module: None), tmp_path / "faulty")
    rewrite(
        faulty,
        lambda tensors: tensors.update({k: v * 1.05 for k, v in tensors.items() if v.ndim == 2}),
    )
    first, *others = diagnose("demo", str(faulty), steps=1, device="cpu").suspects
    assert (first.module, first.cause) == ("transformer", "not quantized at all")
    assert others


def test_what_is_not_a_number_comes_first(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor], module: str) -> None:
        query_and_key_exchanged(tensors, module)
        tensors[f"{module}.to_v.weight"].view(torch.uint8)[0, 0] = 0x7F

    block = "transformer_blocks.0.attn"
    faulty = str(plant(Fault("not a number", "demo-fp8", block, spoil), tmp_path / "faulty"))
    diagnosis = diagnose("demo", faulty, layers=f"{block}.*", steps=1, device="cpu")
    causes = [(suspect.module, suspect.cause) for suspect in diagnosis.suspects]
    assert causes[0] == (f"{block}.to_v", "not a number")
    assert {cause for _, cause in causes[1:]} == {"q/k/v order"}
    json.dumps(diagnosis.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["demo-fp8", "demo-nvfp4", "demo-nvfp4-comfy"])
def test_a_sound_copy_has_no_suspect(name: str) -> None:
    diagnosis = diagnose("demo", name, device="cpu")
    assert diagnosis.suspects == ()
    quantized = [layer for layer in diagnosis.layers if layer.scheme != "plain"]
    assert quantized
    for layer in quantized:
        assert layer.backend
        assert [step.step for step in layer.steps] == [0, 1]
        for step in layer.steps:
            assert 0 < step.output_error < 0.2
            assert step.input is not None
            assert step.input.saturation < 0.01


def test_a_wrong_bias_of_a_quantized_layer_is_named(tmp_path: Path) -> None:
    def swap(tensors: dict[str, Tensor], module: str) -> None:
        tensors[f"{module}.bias"] = torch.cat(tensors[f"{module}.bias"].chunk(2)[::-1])

    module = "transformer_blocks.0.norm1.linear"
    faulty = str(plant(Fault("bias", "demo-nvfp4", module, swap), tmp_path / "faulty"))
    (suspect,) = diagnose("demo", faulty, steps=1, device="cpu").suspects
    assert (suspect.module, suspect.cause) == (f"{module}.bias", "halves of AdaLN swapped")


def test_a_fault_in_every_layer_is_named_in_every_layer(tmp_path: Path) -> None:
    """A reader's mistake affects all layers, so that no layer is an outlier."""

    def swap_all(tensors: dict[str, Tensor], _module: str) -> None:
        for name in [name for name, value in tensors.items() if value.dtype == torch.uint8]:
            nibbles_swapped(tensors, name.removesuffix(".weight"))

    faulty = str(plant(Fault("all", "demo-nvfp4", "", swap_all), tmp_path / "faulty"))
    diagnosis = diagnose("demo", faulty, steps=1, device="cpu")
    quantized = {layer.module for layer in diagnosis.layers if layer.scheme == "nvfp4"}
    assert quantized == {suspect.module for suspect in diagnosis.suspects}
    assert {suspect.cause for suspect in diagnosis.suspects} == {"nibbles swapped"}


def test_a_layer_of_the_second_expert_is_named(
    tmp_path: Path, cases: Callable[[str], Case]
) -> None:
    case = cases("wan_a14b")
    model = shutil.copytree(case.folder, tmp_path / "model")
    (model / SAMPLING_FILE).write_text(
        json.dumps({k: v for k, v in vars(case.sampling).items() if v is not None})
    )
    first, second = (
        export(getattr(case.reference, component), largest, "nvfp4", tmp_path / component)
        for component, largest in case.largest.items()
    )
    assert (
        diagnose(str(model), f"sound={first},transformer_2={second}", device="cpu").suspects == ()
    )
    rewrite(second, lambda tensors: nibbles_swapped(tensors, "blocks.0.attn1.to_v"))
    (suspect,) = diagnose(
        str(model), f"faulty={first},transformer_2={second}", device="cpu"
    ).suspects
    assert (suspect.module, suspect.cause) == (
        "transformer_2.blocks.0.attn1.to_v",
        "nibbles swapped",
    )


class Halving:
    """A backend that is wrong."""

    name, priority, weight_layout = "halving", 1000, PLAIN

    def can(self, weight: WeightSpec, target: Target, activations: str) -> Can | Cannot:
        return Can() if weight.shape == (768, 256) else Cannot("it halves only some")

    def prepare(self, weight: QuantTensor) -> dict[str, Tensor]:
        return {}

    def linear(
        self, x: Tensor, weight: QuantTensor, bias: Tensor | None, activations: str
    ) -> Tensor:
        return kernels.get_backend("reference").linear(x, weight, bias, activations) / 2


def test_a_wrong_kernel_is_told_from_wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.all_backends(), "halving", Halving())
    diagnosis = diagnose(
        "demo", "demo-fp8", layers="single_transformer_blocks.*", steps=1, device="cpu"
    )
    assert {suspect.module for suspect in diagnosis.suspects} == {
        f"single_transformer_blocks.{i}.norm.linear" for i in range(3)
    }
    assert {suspect.cause for suspect in diagnosis.suspects} == {"wrong output of halving"}
    assert {
        layer.steps[0].kernel_error for layer in diagnosis.layers if layer.backend == "halving"
    } == {0.5}


def wrong_tensor(
    scheme: Scheme, parts: dict[str, Tensor], expected: Tensor, limit: float = 0.25
) -> WrongTensor:
    shape = (expected.shape[0], expected.shape[1])
    piece = QuantTensor(scheme, PLAIN, shape, parts)
    return WrongTensor(
        "blocks.0.to_q", scheme.dequantize(parts), expected, [piece], lambda _module: None, limit
    )


def matrix(seed: int = 0, rows: int = 128, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def cause_of(case: WrongTensor) -> str | None:
    found = explain(case)
    return None if found is None else found.cause


def vector(columns: int = 256) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(7)) * 4 + 0.25


def test_inverted_scales_are_told_from_a_factor() -> None:
    weight, scale = matrix(), vector()
    fp8 = encode_fp8(weight)
    assert cause_of(wrong_tensor(FP8, fp8, weight)) is None
    assert (
        cause_of(wrong_tensor(FP8, fp8 | {"weight_scale": 1 / fp8["weight_scale"]}, weight))
        == "scale direction inverted"
    )
    assert (
        cause_of(wrong_tensor(FP8, fp8 | {"weight_scale": 3 * fp8["weight_scale"]}, weight))
        == "scales off by a factor"
    )
    smoothed = encode_nvfp4(weight / scale)
    assert cause_of(wrong_tensor(NVFP4, smoothed | {"pre_quant_scale": scale}, weight)) is None
    inverted = wrong_tensor(NVFP4, smoothed | {"pre_quant_scale": 1 / scale}, weight)
    assert cause_of(inverted) == "scale direction inverted"


@pytest.mark.parametrize(
    "stored",
    [lambda v: to_vector_fragments(v[:, None])[0], lambda v: from_vector_fragments(v[None])[:, 0]],
)
def test_vectors_in_fragments_are_told_either_way(stored: Callable[[Tensor], Tensor]) -> None:
    weight, scale = matrix(), vector()
    case = wrong_tensor(
        NVFP4, encode_nvfp4(weight / scale) | {"pre_quant_scale": stored(scale)}, weight
    )
    assert cause_of(case) == "vectors in fragment order"


@pytest.mark.parametrize(
    "module",
    [
        "single_transformer_blocks.0.norm.linear",
        "transformer_blocks.0.img_mod.1",
        "layers.0.adaLN_modulation.0",
        "double_stream_modulation_img.linear",
    ],
)
@pytest.mark.parametrize("order", [(1, 0), (1, 0, 2), (1, 0, 2, 4, 3, 5), (3, 4, 5, 0, 1, 2)])
def test_shift_and_scale_are_told_among_the_parts_of_a_modulation(
    module: str, order: tuple[int, ...]
) -> None:
    """Parts: (scale, shift), or (shift, scale, gate) once or twice; shift and scale are found."""
    weight = matrix(rows=6 * 32)
    chunks = weight.chunk(len(order))
    parts = encode_fp8(torch.cat([chunks[i] for i in order]))
    case = replace(wrong_tensor(FP8, parts, weight), module=module)
    assert cause_of(case) == "halves of AdaLN swapped"


@pytest.mark.parametrize("encode", [encode_fp8, encode_nvfp4])
def test_weights_of_another_layer_are_told_beside_the_layers_own_scales(
    encode: Callable[[Tensor], dict[str, Tensor]],
) -> None:
    """An exporter that takes to_k for to_q may do so in the codes alone."""
    query, key = matrix(0), matrix(1) * (1 + vector())
    scheme = FP8 if encode is encode_fp8 else NVFP4
    parts = encode(query) | {"codes": encode(key)["codes"]}
    case = replace(
        wrong_tensor(scheme, parts, query),
        sibling=lambda module: key if module.endswith("to_k") else None,
    )
    found = explain(case)
    assert found is not None
    assert (found.cause, found.detail) == (
        "q/k/v order",
        "its codes are those of to_k, but not its scales",
    )
    assert cause_of(replace(case, sibling=lambda _module: matrix(2))) is None


def test_zeroed_codes_are_told_beside_a_low_rank_branch() -> None:
    weight = matrix()
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    up, down = left[:, :64] * sizes[:64], right[:64]
    low_rank = {"proj_up": up.bfloat16(), "proj_down": down.bfloat16(), "smooth": torch.ones(256)}
    parts = encode_nvfp4(weight - up @ down) | low_rank
    assert cause_of(wrong_tensor(NVFP4, parts, weight)) is None
    assert (
        cause_of(wrong_tensor(NVFP4, parts | {"codes": torch.zeros_like(parts["codes"])}, weight))
        == "weights zeroed"
    )


def test_a_low_rank_branch_on_the_wrong_input_is_told() -> None:
    weight, smooth = matrix(), vector()
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    up, down = left[:, :64] * sizes[:64], right[:64]
    parts = encode_nvfp4((weight - up @ down) * smooth) | {"smooth": smooth}
    sound = {"proj_up": up.bfloat16(), "proj_down": down.bfloat16()}
    wrong = {"lora_up": sound["proj_up"], "lora_down": sound["proj_down"]}
    assert cause_of(wrong_tensor(NVFP4, parts | sound, weight)) is None
    assert cause_of(wrong_tensor(NVFP4, parts | wrong, weight)) == "low-rank fed the wrong x"


def test_what_is_not_a_number_is_told() -> None:
    weight = matrix()
    parts = encode_fp8(weight)
    parts["codes"].view(torch.uint8)[3, 5] = 0x7F
    found = explain(wrong_tensor(FP8, parts, weight))
    assert found is not None
    assert (found.cause, found.detail) == ("not a number", "1 values")


def test_noise_has_no_cause() -> None:
    assert cause_of(wrong_tensor(FP8, encode_fp8(matrix(1)), matrix(0))) is None


@pytest.mark.parametrize(
    ("factor", "cause"),
    [
        (1.0, None),
        (0.5, None),
        (1e-3, "input scale too small"),
        (1e6, "input scale too large"),
    ],
)
def test_an_input_scale_is_held_against_the_inputs(factor: float, cause: str | None) -> None:
    x = matrix(2, SAMPLE_ROWS)
    scale = x.abs().max() / 448 * factor
    piece = QuantTensor(FP8, PLAIN, (128, 256), encode_fp8(matrix()) | {"input_scale": scale})
    found = input_range([piece], InputSample(0, x, x.abs().amax(0)))
    assert found is not None
    assert found.fill == pytest.approx(1 / factor, rel=1e-5)
    fault = find_input_scale_problem([found])
    assert (fault and fault.cause) == cause
    assert (found.saturation > 0.5) is (factor == 1e-3)
    assert (found.underflow > 0.5) is (factor == 1e6)
    inverted = QuantTensor(FP8, PLAIN, (128, 256), dict(piece.parts) | {"input_scale": 1 / scale})
    other = input_range([inverted], InputSample(0, x, x.abs().amax(0)))
    assert other is not None
    if factor == 1.0:
        told = find_input_scale_problem([other])
        assert told is not None
        assert told.cause == "scale direction inverted"


def test_a_z_score_needs_a_group_and_a_distance() -> None:
    assert z_score(9.0, [1.0, 1.0, 9.0]) == 0
    assert z_score(1.2, [1.0, 1.0, 1.0, 1.0, 1.2]) == 0
    assert z_score(5.0, [1.0, 1.1, 0.9, 1.0, 5.0]) == pytest.approx(4 / (1.4826 * 0.1))


def test_what_is_recorded_is_what_the_layer_is_given() -> None:
    (reference,) = parse_sources("demo", [])
    name, prompt = "transformer_blocks.0.ff.net.2", read_prompts("demo")[0]
    sampling: Sampling = recommended_sampling("demo").replace(steps=2)
    samples = record_inputs(
        reference, {"transformer": [name]}, [prompt], 3, sampling, CPU
    ).samples_of("transformer", name)
    given: list[Tensor] = []
    pipe = load("demo", device="cpu")
    handle = pipe.transformer.get_submodule(name).register_forward_pre_hook(
        lambda _m, inputs: given.append(inputs[0])
    )
    generate(pipe, [prompt.text], seeds=[3], sampling=sampling)
    handle.remove()
    assert [sample.step for sample in samples] == [0, 1]
    for sample, x in zip(samples, given, strict=True):
        tokens = x.flatten(0, -2)
        assert len(sample.rows) == min(SAMPLE_ROWS, len(tokens))
        assert torch.equal(sample.rows[0], tokens[0])
        assert torch.equal(sample.rows[-1], tokens[-1])
        assert torch.equal(sample.amax, tokens.float().abs().amax(0))


def test_the_command_prints_suspects_and_says_so_by_its_exit_code(tmp_path: Path) -> None:
    fault = FAULTS[0]
    faulty = str(plant(fault, tmp_path / "faulty"))
    only = ("--layers", fault.module, "--steps", "1", "--device", "cpu")
    sound = run("diagnose", "demo", "demo-nvfp4", *only)
    assert (sound.returncode, "nothing suspicious" in sound.stdout) == (0, True), sound.stderr
    table = run("diagnose", "demo", faulty, *only)
    assert table.returncode == 1
    assert "nibbles swapped" in table.stdout
    done = run("diagnose", "demo", faulty, *only, "--json")
    assert done.returncode == 1
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["schema"] == SCHEMA
    assert report["suspects"][0].keys() >= {"module", "score", "cause"}
    assert {layer["module"].removesuffix(".bias") for layer in report["layers"]} == {fault.module}
    assert run("diagnose", "demo", "demo-fp8", "--layers", "nothing.*").returncode == 2


def test_a_layer_that_the_reference_has_not_is_refused() -> None:
    (reference,) = parse_sources("demo", [])
    with pytest.raises(BadRequest, match="no layer nowhere"):
        record_inputs(
            reference,
            {"transformer": ["nowhere"]},
            [Prompt("a")],
            0,
            recommended_sampling("demo").replace(steps=1),
            CPU,
        )


def test_what_is_kept_in_bf16_buys_what_sensitivity_says(tmp_path: Path) -> None:
    role = "transformer_blocks.*.attn.add_k_proj"
    foreseen = sensitivity("demo", "demo-nvfp4", layers=role, steps=2, device="cpu")
    (gain,) = foreseen.gains
    assert (gain.keep_bf16, gain.layers, gain.error_reduction > 0) == (role, 2, True)
    assert gain.error_reduction == pytest.approx(foreseen.error["transformer"] - gain.error)
    mezzotint.convert(
        "demo-nvfp4",
        tmp_path / "kept",
        to="modelopt",
        keep_bf16=[role],
        base=resolve("demo") / "transformer",
    )
    kept = sensitivity(
        "demo", str(tmp_path / "kept"), layers="*.0.attn.to_q", steps=2, device="cpu"
    )
    assert kept.error["transformer"] == pytest.approx(gain.error, rel=1e-6)


def test_a_faulty_role_is_the_most_sensitive_one(tmp_path: Path) -> None:
    fault = FAULTS[0]
    done = run(
        "diagnose",
        "demo",
        str(plant(fault, tmp_path / "faulty")),
        "--sensitivity",
        "--steps",
        "1",
        "--json",
    )
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert (
        max(report["gains"], key=lambda gain: gain["error_reduction"])["keep_bf16"]
        == "transformer_blocks.*.ff.net.2"
    )
    ranked = [gain["error_reduction_per_mib"] for gain in report["gains"]]
    assert ranked == sorted(ranked, reverse=True)
    assert report["keep_bf16"] == [
        gain["keep_bf16"] for gain in report["gains"] if gain["error_reduction"] > 0
    ]


def test_nothing_quantized_cannot_be_ranked(tmp_path: Path) -> None:
    with pytest.raises(
        BadRequest, match="no layer of the candidate that matches --layers is quantized"
    ):
        sensitivity("demo", f"same={resolve('demo') / 'transformer'}", device="cpu")
