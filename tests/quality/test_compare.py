"""`compare`: measurements, verdicts, output files, and interruption."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mezzotint import convert
from mezzotint.builtin import resolve
from mezzotint.errors import BadRequest
from mezzotint.generation.pipeline import recommended_sampling
from mezzotint.quality.candidate import parse_sources
from mezzotint.quality.compare import Comparison, compare
from mezzotint.quality.compare.comparison import SCHEMA
from mezzotint.quality.compare.floor import NoiseFloor, NoiseLevel
from mezzotint.quality.compare.gate import Gate, Limit, profile_for, read_gate
from mezzotint.quality.compare.runs import run_identity
from mezzotint.quality.compare.scores import Score, intervals
from mezzotint.quality.metrics.image import METRICS
from mezzotint.quality.prompts import SETS, read_prompts
from mezzotint.quality.report import tables, write_report
from mezzotint.quality.resident import Resident, measure_resident
from mezzotint.quality.weights import WeightCheck, check_weights
from support.checkpoint_edits import rewrite
from support.cli_runner import run
from support.modelopt_exporter import export
from support.pipeline_cases import Case
from support.planted_faults import Fault, plant, scales_tiled

pytestmark = pytest.mark.usefixtures("encoders_loaded_once")
PROMPTS = (
    "a large red circle on a blue background",
    "a small green triangle on a yellow background",
)
STEPS = 4


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "two.txt"
    file.write_text("# round\n" + "\n\n# pointed\n".join(PROMPTS) + "\n")
    return str(file)


def compared(
    output: Path, prompts: str, *candidates: str, steps: int = STEPS, **options: Any
) -> Comparison:
    return compare(
        "demo", candidates, output, prompts=prompts, steps=steps, device="cpu", **options
    )


QUICK: Mapping[str, Any] = {"steps": 1, "metrics": ["psnr"]}
"""Settings where neither images nor metrics matter."""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, prompts: str) -> tuple[Path, dict[str, Any]]:
    """The built-in model against its FP8 and NVFP4 copies: (folder, report)."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("compare") / "report"
    write_report(compared(output, prompts, "demo-fp8", "w4=demo-nvfp4", seeds=2), output)
    return output, json.loads((output / "report.json").read_text())


def generated(
    output: Path, model: dict[str, Any], prompt: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (pixels, latents of all steps) of a report's model, found under runs/ by its files."""
    for file in output.glob("runs/*/run.json"):
        if json.loads(file.read_text())["identity"] == model["identity"]:
            for entry in file.parent.glob("*.json"):
                request = json.loads(entry.read_text())
                if (request.get("prompt"), request.get("seed"), request.get("other_kernels")) == (
                    prompt,
                    seed,
                    False,
                ):
                    latents = load_file(entry.with_suffix(".safetensors"))["latents"]
                    return np.asarray(
                        Image.open(entry.with_suffix(".png"))
                    ), latents.double().numpy()
    raise AssertionError(f"{prompt} was not generated")


def test_the_report_has_what_its_schema_promises(done: tuple[Path, dict[str, Any]]) -> None:
    _, report = done
    assert report["schema"] == SCHEMA
    assert report["verdict"] == "pass"
    assert [candidate["name"] for candidate in report["candidates"]] == ["demo-fp8", "w4"]
    for candidate in report["candidates"]:
        assert candidate["verdict"] == "pass"
        assert candidate["reasons"] == []
        assert candidate["metrics"].keys() == METRICS.keys()
        assert candidate["metrics"]["lpips"] is None
        assert candidate["metrics"]["st_lpips"] > 0
        assert len(candidate["trajectory"]["latent_cosine"]) == STEPS
        assert len(candidate["images"]) == 4
        assert candidate["cost"]["seconds_per_step"]["count"] == 4 * STEPS
        assert candidate["cost"]["memory"][1]["driver"] > 0
    assert "torchvision" in report["settings"]["unavailable"]["lpips"]
    assert [prompt["category"] for prompt in report["settings"]["prompts"]] == ["round", "pointed"]
    assert [c["gate"]["name"] for c in report["candidates"]] == ["fp8", "w4"]


def test_what_is_resident_is_reported(done: tuple[Path, dict[str, Any]]) -> None:
    _, report = done
    resident = [model["resident"] for model in (report["reference"], *report["candidates"])]
    assert [round(one["bits_per_weight"], 1) for one in resident] == [16.0, 8.5, 5.2]
    assert resident[0]["quantized_share"] == 0
    assert resident[1]["bytes"]["float8_e4m3fn"] > 7e6
    assert report["candidates"][0]["claims"] == ["config.json: FP8"]


def test_the_numbers_are_those_of_scikit_image_and_numpy(done: tuple[Path, dict[str, Any]]) -> None:
    output, report = done
    for candidate in report["candidates"]:
        expected: dict[str, list[float]] = {
            name: [] for name in ("psnr", "ssim", "latent_cosine_last", "mae")
        }
        steps = []
        for prompt in PROMPTS:
            for seed in (0, 1):
                r, r_latents = generated(output, report["reference"], prompt, seed)
                c, c_latents = generated(output, candidate, prompt, seed)
                options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
                expected["psnr"].append(peak_signal_noise_ratio(r, c, data_range=255))
                expected["ssim"].append(
                    structural_similarity(r, c, data_range=255, channel_axis=2, **options)
                )
                expected["mae"].append(np.abs(r.astype(float) - c).mean())
                pairs = [(a.ravel(), b.ravel()) for a, b in zip(r_latents, c_latents, strict=True)]
                steps.append([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
                expected["latent_cosine_last"].append(steps[-1][-1])
        for name, values in expected.items():
            assert candidate["metrics"][name] == pytest.approx(np.mean(values), rel=1e-6), name
        assert candidate["trajectory"]["latent_cosine"] == pytest.approx(
            np.mean(steps, axis=0), rel=1e-9
        )


def test_every_column_has_its_cell(done: tuple[Path, dict[str, Any]]) -> None:
    _, report = done
    for model in (report["reference"], *report["candidates"]):
        assert len(tables.cost_row(model, report["reference"])) == len(tables.COST_TITLES)
    rows = [
        line for line in (done[0] / "report.md").read_text().splitlines() if line.startswith("|")
    ]
    assert {row.count("|") for row in rows[:6]} == {len(tables.shown_metrics(report)) + 2}
    assert {row.count("|") for row in rows[7:]} == {len(tables.COST_TITLES) + 2}


def test_the_noise_floor_has_two_ends(done: tuple[Path, dict[str, Any]]) -> None:
    _, report = done
    near, far = (
        report["noise_floor"][level]["metrics"] for level in ("other_kernels", "other_seed")
    )
    for candidate in report["candidates"]:
        for name, value in candidate["metrics"].items():
            if value is not None:
                distance = METRICS[name].distance
                assert distance(near[name]) < distance(value) < distance(far[name]), name
                span = distance(far[name]) - distance(near[name])
                assert candidate["drift"][name] == pytest.approx(
                    (distance(value) - distance(near[name])) / span
                )


def test_the_page_needs_nothing_else(done: tuple[Path, dict[str, Any]]) -> None:
    output, _ = done
    page = re.sub('base64,[^)"]+', "", (output / "report.html").read_text())
    assert not re.findall(r"(?:https?:)?//[a-z]", page)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]{11})', page))
    assert page.index('class="verdict pass"') < page.index("<table")
    assert page.count('class="view"') == 2 * 4
    assert "data-full=" not in page
    assert not (output / "images").exists()
    markdown = (output / "report.md").read_text()
    assert markdown.startswith("# PASS: demo against demo-fp8, w4\n")
    for text in (page, markdown):
        assert "gate fp8, 126 weights checked, none wrong" in text
    with Image.open(output / "sheet.png") as sheet:
        assert sheet.size[1] > 3 * 64


def test_a_printed_page_has_the_tables_that_are_folded_on_a_screen(
    done: tuple[Path, dict[str, Any]],
) -> None:
    page = (done[0] / "report.html").read_text()
    assert page.count("<details>") == len(done[1]["candidates"])
    assert (
        "details::details-content { content-visibility: visible; }"
        in page[page.index("@media print") :]
    )


def test_weights_that_could_not_be_checked_are_reported(
    done: tuple[Path, dict[str, Any]],
) -> None:
    candidate = done[1]["candidates"][0]
    assert "not checked" in tables.gate_text(candidate | {"weights": None})
    assert "126 weights checked, 2 wrong" in tables.gate_text(
        candidate | {"weights": {"checked": 126, "wrong": 2}}
    )


def test_no_option_finds_what_was_generated_with_another() -> None:
    options = ("", ",activations=bf16", ",backend=reference", ",resident=fp8", ",bf16_steps=1+1")
    _, *sources = parse_sources(
        "demo", [f"{i}=demo-nvfp4{option}" for i, option in enumerate(options)]
    )
    sampling = recommended_sampling(sources[0].model)
    kept = {json.dumps(run_identity(source, sampling, torch.device("cpu"))) for source in sources}
    assert len(kept) == len(options)


def without_times(report: Path) -> str:
    """report.json less when and by which command it was made, and what it cost."""
    entries = json.loads(report.read_text())
    for model in (entries["reference"], *entries["candidates"]):
        del model["cost"]
    del entries["created"], entries["command"]
    return json.dumps(entries)


class Killed(BaseException):
    """Stand-in for a signal."""


def test_a_killed_run_goes_on_and_reports_the_same(tmp_path: Path, prompts: str) -> None:
    def kill(at: int) -> Callable[[int, int, str], None]:
        def on_image(done: int, _total: int, _name: str) -> None:
            if done == at:
                raise Killed

        return on_image

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for at in (3, 7):
        with pytest.raises(Killed):
            compared(cut, prompts, "demo-fp8", **QUICK, on_image=kill(at))
    for output in (cut, whole):
        write_report(compared(output, prompts, "demo-fp8", **QUICK), output)
    assert without_times(cut / "report.json") == without_times(whole / "report.json")
    before = json.loads((cut / "report.json").read_text())
    write_report(compared(cut, prompts, "demo-fp8", **QUICK), cut)
    assert json.loads((cut / "report.json").read_text()) | {"created": None} == before | {
        "created": None
    }


@pytest.mark.slow
@pytest.mark.parametrize("images", [5, 30, 60])
def test_a_run_that_is_killed_by_the_system_goes_on(tmp_path: Path, images: int) -> None:
    """SIGKILL after so many of 96 images. 50 s each on two cores; found: the same report."""
    command = [
        sys.executable,
        "-m",
        "mezzotint",
        "compare",
        "demo",
        "demo-fp8",
        "--device",
        "cpu",
        "-o",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, whole], check=True, capture_output=True)
    with subprocess.Popen(
        [*command, cut], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while len(list(cut.glob("runs/*/*.png"))) < images:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not (cut / "report.json").exists()
    subprocess.run([*command, cut, "--resume"], check=True, capture_output=True)
    assert without_times(cut / "report.json") == without_times(whole / "report.json")


def test_a_candidate_more_generates_nothing_again(
    done: tuple[Path, dict[str, Any]], tmp_path: Path, prompts: str
) -> None:
    output = Path(shutil.copytree(done[0], tmp_path / "report"))
    before = {file: file.stat().st_mtime_ns for file in output.glob("runs/*/*")}
    twin = "twin=demo"
    comparison = compared(output, prompts, "demo-fp8", twin, seeds=2)
    assert {file: file.stat().st_mtime_ns for file in output.glob("runs/*/*")} == before
    same = comparison.candidates[1]
    assert same.gate.name == "strict"
    assert same.verdict == "pass"
    assert all(one.metrics["latent_rmse_last"] == 0 for one in same.scores)


def test_files_that_change_are_generated_again(tmp_path: Path, prompts: str) -> None:
    copy = Path(shutil.copytree(resolve("demo-fp8"), tmp_path / "copy"))
    compared(tmp_path / "report", prompts, str(copy), **QUICK)
    (copy / "note.json").write_text("{}")
    compared(tmp_path / "report", prompts, str(copy), **QUICK)
    assert len(list(tmp_path.glob("report/runs/*/run.json"))) == 3


def test_bf16_that_claims_fp8_fails(tmp_path: Path, prompts: str) -> None:
    unquantized_claim = Path(
        shutil.copytree(resolve("demo") / "transformer", tmp_path / "unquantized_claim")
    )
    shutil.copy(resolve("demo-fp8") / "config.json", unquantized_claim / "config.json")
    comparison = compared(tmp_path / "report", prompts, str(unquantized_claim), **QUICK)
    assert comparison.verdict == "fail"
    claimed, bits, share = comparison.candidates[0].reasons
    assert (
        claimed == "it claims to be quantized (config.json: FP8), "
        "and all its weights are resident as bfloat16"
    )
    assert bits == "16.0 bits per weight are resident, and the gate allows at most 10"
    assert share.startswith("0% of the linear layers' weights are resident quantized")


def test_a_wrong_layer_that_the_images_do_not_show_fails(tmp_path: Path, prompts: str) -> None:
    """Tiled scales of one layer, read as rows: over 24 prompts, its drift is a good copy's."""
    module = "transformer_blocks.1.attn.to_add_out"
    faulty = plant(Fault("tiled", "demo-nvfp4", module, scales_tiled), tmp_path / "faulty")
    sound, wrong = compared(
        tmp_path / "report", prompts, "demo-nvfp4", f"wrong={faulty}", **QUICK
    ).to_dict()["candidates"]
    assert (sound["weights"]["wrong"], sound["weights"]["worst"]) == (0, None)
    assert sound["weights"]["checked"] == 126  # every tensor of the unquantized model
    assert wrong["verdict"] == "fail"
    assert (wrong["weights"]["wrong"], wrong["weights"]["worst"]["module"]) == (1, module)
    assert any(reason.startswith("1 of ") and module in reason for reason in wrong["reasons"])


def test_weights_are_compared_with_a_quantized_reference_and_its_rounding(
    tmp_path: Path,
) -> None:
    def weights(reference: str, candidate: str) -> WeightCheck | None:
        return check_weights(*parse_sources(reference, [candidate]), torch.device("cpu"))

    for reference, candidate in (
        ("demo-nvfp4", "demo-fp8"),
        ("demo-fp8", "demo"),
        ("demo-nvfp4", "b=demo-nvfp4"),
    ):
        found = weights(reference, candidate)
        assert found is not None
        assert found.wrong == 0
    other = shutil.copytree(resolve("demo"), tmp_path / "other")
    config = json.loads((other / "transformer/config.json").read_text())
    (other / "transformer/config.json").write_text(json.dumps(config | {"num_layers": 1}))
    rewrite(
        other / "transformer",
        lambda tensors: [
            tensors.pop(name) for name in list(tensors) if name.startswith("transformer_blocks.1.")
        ],
    )
    assert weights("demo", str(other)) is None
    gate = Gate("mine", (), max_wrong_weights=0)
    (reason,) = gate.reasons({}, {}, resident_weights(), None)
    assert reason.startswith("the weights cannot be compared with the reference's")


def test_the_command_has_three_exit_codes(tmp_path: Path, prompts: str) -> None:
    common = ("--prompts", prompts, "--steps", "2", "--metrics", "psnr,flip", "--device", "cpu")
    good = run("compare", "demo", "demo-fp8", *common, "-o", "report", "--json", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["candidates"][0]["metrics"]["flip"] < 0.1
    again = run("compare", "demo", "demo-fp8", *common, "-o", "report", cwd=tmp_path)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    strict = run(
        "compare",
        "demo",
        "demo-fp8",
        *common,
        "-o",
        "report",
        "--resume",
        "--gate",
        "strict",
        cwd=tmp_path,
    )
    assert strict.returncode == 1
    assert "demo-fp8 fails: drift of latent RMSE is 0." in strict.stdout
    nothing = run("compare", "demo", "nothing", *common, "-o", "other", cwd=tmp_path)
    assert nothing.returncode == 2
    assert not (tmp_path / "other").exists()


def test_a_video_is_compared_frame_by_frame(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("wan_ti2v")
    exported = export(
        case.reference.transformer, case.largest["transformer"], "fp8", tmp_path / "fp8"
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n")
    output = tmp_path / "report"
    settings = {
        "prompts": str(prompts),
        "steps": 2,
        "size": {"height": 32, "width": 32},
        "frames": 5,
        "device": "cpu",
    }
    comparison = compare(
        str(case.folder), [str(exported)], output, metrics=["psnr", "flip"], **settings
    )
    (one,) = comparison.candidates[0].scores
    request = next(iter(comparison.settings.requests().values()))
    r, c = (model.frames(request) for model in (comparison.reference, comparison.candidates[0].run))
    values = [
        peak_signal_noise_ratio(np.asarray(a), np.asarray(b)) for a, b in zip(r, c, strict=True)
    ]
    assert len(values) == 5
    assert one.metrics["psnr"] == pytest.approx(np.mean(values))
    assert one.worst["psnr"] == pytest.approx(min(values))
    write_report(comparison, output)
    assert "the worst" in (output / "report.html").read_text()


def test_sources_have_names_and_options() -> None:
    reference, plain, named, odd = parse_sources(
        "demo", ["demo-nvfp4", "w4a16=demo-nvfp4,activations=bf16", "demo-fp8,backend=reference"]
    )
    assert (reference.name, reference.model, reference.transformer) == ("demo", "demo", None)
    assert (plain.name, plain.model, plain.transformer, plain.activations) == (
        "demo-nvfp4",
        "demo",
        "demo-nvfp4",
        "as_stored",
    )
    assert (named.name, named.activations) == ("w4a16", "bf16")
    assert (odd.name, odd.backend) == ("demo-fp8 backend=reference", "reference")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["demo-fp8", "demo-fp8"], "two models have the name 'demo-fp8'"),
        (["demo-fp8,speed=high"], "'speed=high' is not an option"),
        (["demo-fp8,backend="], "'backend=' is not an option"),
    ],
)
def test_sources_that_cannot_be_are_refused(sources: list[str], message: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(message)):
        parse_sources("demo", sources)


def test_a_model_is_called_after_the_part_of_its_path_that_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("flux-fp8/transformer", "x/a.safetensors"):
        (tmp_path / folder).mkdir(parents=True)
    names = [
        one.name for one in parse_sources("demo", ["./flux-fp8/transformer", "./x/a.safetensors"])
    ]
    assert names == ["demo", "flux-fp8", "a"]


def test_the_sets_have_24_prompts_of_every_kind() -> None:
    assert list(SETS) == ["default", "demo", "edit"]
    for name in SETS:
        assert len(read_prompts(name)) == 24
    subjects = {prompt.category for prompt in read_prompts("default")}
    assert subjects >= {
        "text in the image",
        "fine texture",
        "dark scenes",
        "saturated colour",
        "many objects",
    }
    assert subjects >= {"hands and faces", "long captions"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("# only a heading\n", "contains no prompt"), ("a\nb\na\n", "'a' is repeated")],
)
def test_prompt_files_that_cannot_be_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    with pytest.raises(BadRequest, match=message):
        read_prompts(str(file))
    with pytest.raises(BadRequest, match="this file does not exist"):
        read_prompts(str(tmp_path / "nothing"))


def test_prompt_files_of_other_editors_are_read(tmp_path: Path) -> None:
    """With a byte order mark, Windows line ends, an indented heading, and letters of any script."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\r\n  # signs\r\n  日本語の猫 <b>\r\n".encode())
    assert [(prompt.text, prompt.category) for prompt in read_prompts(str(file))] == [
        ("a cat", ""),
        ("日本語の猫 <b>", "signs"),
    ]
    file.write_bytes(b"a caf\xe9\n")
    with pytest.raises(BadRequest, match="is not UTF-8: byte 5 is 0xe9"):
        read_prompts(str(file))


def test_what_cannot_be_kept_is_not_generated(tmp_path: Path, prompts: str) -> None:
    """A file where the folder is to be, or a backend that does not exist."""
    file = tmp_path / "file"
    file.touch()
    for output in (file, file / "report"):
        with pytest.raises(BadRequest, match=f"-o is {output}, and this folder cannot be created"):
            compared(output, prompts, "demo-fp8")
    with pytest.raises(BadRequest, match="there is no backend 'none'"):
        compared(tmp_path / "report", prompts, "demo-fp8,backend=none")
    for option, message in (
        ({"device": "tpu9"}, "there is no device 'tpu9'"),
        ({"device": "cuda:99"}, "device is 'cuda:99', and PyTorch finds no such device here"),
        ({"frames": 5}, "--frames is for videos"),
    ):
        with pytest.raises(BadRequest, match=message):
            compare("demo", ["demo-fp8"], tmp_path / "report", prompts=prompts, **option)
    assert not list(tmp_path.glob("report/runs/*"))


def test_metrics_that_were_not_asked_for_are_null(tmp_path: Path, prompts: str) -> None:
    options = {"-o": "report", "--steps": "1", "--seeds": "2", "--device": "cpu"}
    options |= {"--prompts": prompts, "--metrics": "psnr, flip"}
    done = run("compare", "demo", "demo-fp8", *chain.from_iterable(options.items()), cwd=tmp_path)
    assert done.returncode in (0, 1), done.stderr
    (candidate,) = json.loads((tmp_path / "report/report.json").read_text())["candidates"]
    assert candidate["metrics"].keys() == METRICS.keys()
    assert {name for name, value in candidate["metrics"].items() if value is None} == {
        "lpips",
        "ms_ssim",
        "mae",
    }


def resident_weights(**changes: Any) -> Resident:
    """Return resident weights in NVFP4, except for a quarter in BF16."""
    return replace(Resident({}, {}, 0.75, 7.4, 4.5, 0), **changes)


def test_what_is_kept_in_bf16_does_not_change_the_profile(tmp_path: Path) -> None:
    """NVFP4 with modulations in BF16 takes 7.6 bits per weight, and is still NVFP4; BF16 is not."""
    convert("demo-nvfp4", tmp_path / "kept", keep_bf16=["*norm*"], base="demo")
    (candidate,) = parse_sources("demo", [str(tmp_path / "kept")])[1:]
    found = measure_resident(candidate.load(torch.device("cpu")).pipe)
    assert (found.bits_per_weight > 7, found.quantized_bits < 5) == (True, True)
    gate = read_gate(profile_for(found.quantized_bits, ["NVFP4"]))
    assert gate.name == "w4"
    assert list(gate._resident_reasons(found)) == []
    assert list(gate._resident_reasons(resident_weights(quantized_share=0.4))) == [
        "40% of the linear layers' weights are resident quantized, "
        "and the gate requires at least 50%"
    ]
    assert next(gate._resident_reasons(resident_weights(quantized_bits=8.5))).startswith(
        "8.5 bits per weight are resident"
    )


def test_a_gate_is_a_file_of_limits(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "max_bits_per_weight = 5\n[limits.psnr]\nmin = 30\nmax_drift = 0.5\n"
        "[limits.lpips]\nmax = 0.1\n"
    )
    gate = read_gate(str(file))
    assert gate == Gate(
        "mine",
        (Limit("psnr", "min", 30), Limit("psnr", "max_drift", 0.5), Limit("lpips", "max", 0.1)),
        5,
    )
    metrics, drift = {"psnr": 29.0, "lpips": None}, {"psnr": 0.5}
    assert list(
        gate.reasons(
            metrics, drift, resident_weights(quantized_bits=5.5, unit_input_scales=3), None
        )
    ) == [
        "5.5 bits per weight are resident, and the gate allows at most 5",
        "mean PSNR is 29.0, and the gate requires at least 30",
        "mean LPIPS could not be computed, and the gate requires at most 0.1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[limits.beauty]\nmin = 1\n", "no metric beauty"),
        ("[limits.psnr]\nlow = 1\n", "low = 1"),
        ("[limits.psnr]\nmin = 'high'\n", "min = 'high'"),
        ("min = 1\n", "min: a gate has"),
        ("max_bits_per_weight = 'few'\n", "max_bits_per_weight: a gate has"),
        ("limits = [", "is not TOML"),
        ("limits = 3\n", "limits = 3"),
        ("[limits]\npsnr = 30\n", "psnr = 30"),
        ("[limits.psnr]\nmin = true\n", "min = True"),
        ("[limits.psnr]\nmin = nan\n", "min = nan"),
        ("max_bits_per_weight = false\n", "max_bits_per_weight: a gate has"),
        ("", "has no limit, so every candidate would pass"),
    ],
)
def test_gates_that_cannot_be_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(BadRequest, match=message):
        read_gate(str(file))


def test_a_skipped_optional_limit_is_reported(
    done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "[limits.st_lpips]\nmax_drift = 0.1\noptional = true\n[limits.lpips]\nmax = 0.1\n"
    )
    gate = read_gate(str(file)).without(["st_lpips", "lpips"])
    assert gate == Gate("mine", (Limit("lpips", "max", 0.1),), skipped=("st_lpips",))
    assert list(gate.reasons({"lpips": None}, {}, resident_weights(), None)) == [
        "mean LPIPS could not be computed, and the gate requires at most 0.1"
    ]
    judged = done[1]["candidates"][0] | {"gate": gate.to_dict()}
    assert (
        tables.gate_text(judged)
        == "gate mine without its limit on ST-LPIPS, 126 weights checked, none wrong"
    )
    file.write_text("[limits.st_lpips]\nmax = 1\noptional = 1\n")
    with pytest.raises(BadRequest, match="st_lpips: optional = 1"):
        read_gate(str(file))


def test_the_profiles_hold_st_lpips_where_it_can_be_had() -> None:
    for name in ("fp8", "w4"):
        (limit,) = (limit for limit in read_gate(name).limits if limit.metric == "st_lpips")
        assert (limit.kind, limit.optional) == ("max_drift", True)


def test_drift_is_0_at_other_kernels_and_1_at_another_seed() -> None:
    near, far = ({"psnr": value, "ssim": ssim} for value, ssim in ((60.0, 0.99), (20.0, 0.5)))
    floor = NoiseFloor(NoiseLevel(near, {}), NoiseLevel(far, {}))
    assert floor.drift("psnr", 60.0) == 0
    assert floor.drift("psnr", 20.0) == 1
    assert floor.drift("psnr", 40.0) == pytest.approx((0.01 - 0.001) / (0.1 - 0.001))
    assert floor.drift("ssim", 0.745) == pytest.approx(0.5)
    assert floor.drift("lpips", 0.1) is None
    assert NoiseFloor(NoiseLevel(far, {}), NoiseLevel(near, {})).drift("ssim", 0.6) is None


def test_the_interval_is_the_bootstraps_over_prompts() -> None:
    """A mean of n values has close to 1.96 standard errors; seeds of one prompt count as one."""
    values = np.random.default_rng(1).normal(30, 4, 200)
    scores = [
        Score(prompt, seed, {"psnr": float(value)}, {}, 0, {})
        for prompt, value in enumerate(values)
        for seed in (0, 1)
    ]
    found = intervals(scores)["psnr"]
    assert found is not None
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert found == pytest.approx([values.mean() - error, values.mean() + error], abs=0.15 * error)
