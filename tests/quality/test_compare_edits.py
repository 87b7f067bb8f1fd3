"""Comparisons of edits: the source image is in every generation, stored run's key and report."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.errors import BadRequest
from mezzotint.generation.generate import GenerationResult, generate
from mezzotint.generation.source_image import read_source_image
from mezzotint.quality.compare import Comparison, compare
from mezzotint.quality.compare.runs import ImageRequest
from mezzotint.quality.diagnose import diagnose
from mezzotint.quality.prompts import read_prompts
from mezzotint.quality.report import write_report
from mezzotint.quality.sensitivity import sensitivity
from support.modelopt_exporter import export
from support.pipeline_cases import IMAGE_SIZE, Case

pytestmark = pytest.mark.usefixtures("runnable_edit_pipelines", "encoders_loaded_once")
OTHER = IMAGE_SIZE.rotate(180)
EDITS = ("flux1_kontext", "flux2_klein")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two prompts: the first names its source image, the second edits the one of --image."""
    (tmp_path / "set").mkdir()
    IMAGE_SIZE.save(tmp_path / "set/own.png")
    OTHER.save(tmp_path / "other.png")
    (tmp_path / "set/edits.txt").write_text("# light\nmake it night\town.png\nmake it red\n")
    return tmp_path / "set/edits.txt"


def compared(case: Case, output: Path, prompts: Path, image: Path, **options: Any) -> Comparison:
    """Compare with an FP8 copy, stored next to the prompts."""
    copy = prompts.parent / "fp8"
    if not copy.exists():
        export(case.reference.transformer, case.largest["transformer"], "fp8", copy)
    settings = {
        "prompts": str(prompts),
        "steps": 2,
        "size": {"height": 32, "width": 32},
        "device": "cpu",
    } | options
    return compare(str(case.folder), [str(copy)], output, image=image, metrics=["psnr"], **settings)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", EDITS)
def test_every_model_edits_the_image_and_the_report_shows_it(
    cases: Callable[[str], Case], tmp_path: Path, prompts: Path, name: str
) -> None:
    case, other = cases(name), tmp_path / "other.png"
    comparison = compared(case, tmp_path / "report", prompts, other)
    requests = comparison.settings.requests().values()
    texts, sampling = [request.prompt for request in requests], comparison.settings.sampling
    for run in (comparison.reference, comparison.candidates[0].run):
        pipe = run.candidate.load(torch.device("cpu")).pipe
        expected = generate(
            pipe, texts, seeds=[0, 0], sampling=sampling, source_images=[IMAGE_SIZE, OTHER]
        )
        found = torch.cat([run.output(request).trajectory[-1] for request in requests])
        assert torch.equal(found, expected.latents)
    write_report(comparison, tmp_path / "report")
    entries = json.loads((tmp_path / "report/report.json").read_text())["settings"]["prompts"]
    image = prompts.parent / "own.png"
    assert entries == [
        {
            "text": "make it night",
            "category": "light",
            "image": str(image),
            "image_sha256": sha256(image),
        },
        {
            "text": "make it red",
            "category": "light",
            "image": str(other),
            "image_sha256": sha256(other),
        },
    ]
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("<figcaption>source image</figcaption>") == 2


def test_what_is_kept_goes_by_the_images_bytes(
    cases: Callable[[str], Case], tmp_path: Path, prompts: Path
) -> None:
    case, output, other = cases("flux1_kontext"), tmp_path / "report", tmp_path / "other.png"

    def stored() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in output.glob("runs/*/*.png")}

    compared(case, output, prompts, other)
    before = stored()
    assert len(before) == 2 * 2 + 2 * 2, (
        "both prompts by both models, and by two runs of the noise floor"
    )
    moved = Path(shutil.copy(other, tmp_path / "moved.png"))
    compared(case, output, prompts, moved)
    assert stored() == before
    IMAGE_SIZE.rotate(90).save(moved)
    compared(case, output, prompts, moved)
    assert stored().items() > before.items()
    assert len(stored()) == len(before) + 4, "one of the prompts"


def test_the_key_of_what_edits_nothing_is_what_it_was() -> None:
    """Images of an earlier version are not generated again."""
    assert ImageRequest("a red fox", 0).key == "baefa4c1104d4d6eda81"


def test_without_a_size_the_first_image_gives_the_shape(
    cases: Callable[[str], Case], tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases("flux1_kontext")
    sampling = case.sampling.replace(height=96)
    monkeypatch.setattr(
        "mezzotint.generation.source.index_sampling",
        lambda _, image: sampling.with_aspect_ratio(*image.size),
    )
    comparison = compared(case, tmp_path / "report", prompts, tmp_path / "other.png", size=None)
    assert (comparison.settings.sampling.width, comparison.settings.sampling.height) == (128, 64)


def test_instructions_are_the_set_where_a_image_is_given(prompts: Path) -> None:
    image = read_source_image(prompts.parent / "own.png")
    assert {prompt.image for prompt in read_prompts("edit", image)} == {image}
    assert {prompt.image for prompt in read_prompts("edit")} == {None}


def test_a_prompt_may_edit_two_images_and_one_not_twice(prompts: Path) -> None:
    prompts.write_text("make it night\town.png\nmake it night\t../other.png\nmake it night\n")
    assert [prompt.text for prompt in read_prompts(str(prompts))] == ["make it night"] * 3
    prompts.write_text("make it night\town.png\nmake it night\t./own.png\n")
    with pytest.raises(BadRequest, match="'make it night' is repeated"):
        read_prompts(str(prompts))
    prompts.write_text("make it night\tabsent.png\n")
    with pytest.raises(BadRequest, match=r"set/absent\.png: no such image"):
        read_prompts(str(prompts))


@pytest.mark.parametrize(
    ("find", "module"), [(diagnose, "recording"), (sensitivity, "sensitivity.recorded_calls")]
)
def test_diagnose_lets_the_reference_edit(
    cases: Callable[[str], Case],
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    find: Callable[..., Any],
    module: str,
) -> None:
    case, other = cases("flux2_klein"), tmp_path / "other.png"
    folder = Path(shutil.copytree(case.folder, tmp_path / "model"))
    (folder / "sampling.json").write_text('{"height": 32}')
    copy = export(case.reference.transformer, case.largest["transformer"], "fp8", tmp_path / "fp8")
    sources: list[bytes] = []

    def spy(*arguments: Any, source_images: Any, **options: Any) -> GenerationResult:
        sources.extend(image.tobytes() for image in source_images)
        return generate(*arguments, source_images=source_images, **options)

    monkeypatch.setattr(f"mezzotint.quality.{module}.generate", spy)
    options = {"prompts": str(prompts), "steps": 1, "layers": "x_embedder", "device": "cpu"}
    found = find(str(folder), str(copy), image=other, **options)
    assert sources == [IMAGE_SIZE.tobytes(), OTHER.tobytes()]
    assert [one["image"] for one in found.settings["images"]] == [
        str(prompts.parent / "own.png"),
        str(other),
    ]


def test_models_that_cannot_edit_are_refused_before_anything_is_generated(
    tmp_path: Path, prompts: Path
) -> None:
    with pytest.raises(BadRequest, match="FluxPipeline takes no source image"):
        compare(
            "demo", ["demo-fp8"], tmp_path / "report", image=tmp_path / "other.png", device="cpu"
        )
    assert not (tmp_path / "report").exists()
    with pytest.raises(BadRequest, match="FluxPipeline takes no source image"):
        diagnose("demo", "demo-fp8", image=tmp_path / "other.png", device="cpu")
