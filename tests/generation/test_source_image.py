"""Image editing: which pipelines take an image, that it arrives unchanged, and is recorded."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from mezzotint.cli import app
from mezzotint.errors import BadRequest, Unsupported
from mezzotint.families import Sampling, families
from mezzotint.generation.generate import generate
from mezzotint.generation.pipeline import recommended_sampling
from mezzotint.generation.pipeline_selection import check_source_image, source_image_pipelines
from mezzotint.generation.source_image import read_source_image
from mezzotint.quality.metrics.image import latent_cosine
from support import tiny_pipelines as tiny
from support.modelopt_exporter import export
from support.pipeline_cases import IMAGE_SIZE, PROMPTS, Case

pytestmark = pytest.mark.usefixtures("runnable_edit_pipelines")
OTHER = IMAGE_SIZE.rotate(180)
QWEN = ("QwenImageEdit", "QwenImageEditPlus")
EDITS = ("flux1_kontext", "flux2", "flux2_klein", "wan_i2v", "wan_ti2v")


@pytest.fixture
def source_image(tmp_path: Path) -> Path:
    IMAGE_SIZE.save(tmp_path / "image.png")
    return tmp_path / "image.png"


def edit(pipe: Any, case: Case, *images: Image.Image) -> torch.Tensor:
    return generate(
        pipe,
        PROMPTS[: len(images)],
        sampling=case.sampling,
        check_output=False,
        source_images=images,
    ).latents


def run_generate(case: Case, *arguments: object) -> Result:
    common = ("--model", case.folder, "--device", "cpu", "--steps", 2)
    return CliRunner().invoke(app, ["generate", "make it night", *map(str, (*common, *arguments))])


@pytest.mark.parametrize("name", EDITS)
def test_the_image_is_what_diffusers_own_call_is_given(
    cases: Callable[[str], Case], name: str
) -> None:
    case = cases(name)
    last: list[torch.Tensor] = []

    def keep(
        _pipe: Any, _step: int, _timestep: Any, values: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        last[:] = [values["latents"]]
        return {}

    pipe = case.reference
    if name == "wan_ti2v":
        pipe = diffusers.WanImageToVideoPipeline(**pipe.components, expand_timesteps=True)
    pipe(
        image=IMAGE_SIZE,
        prompt=PROMPTS[0],
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=case.sampling.guidance,
        generator=torch.Generator("cpu").manual_seed(0),
        max_sequence_length=case.sampling.max_sequence_length,
        callback_on_step_end=keep,
        **({"max_area": 32 * 32} if name == "flux1_kontext" else {}),
        **({"num_frames": 5} if name.startswith("wan") else {}),
    )
    ours = edit(case.load(), case, IMAGE_SIZE, OTHER)
    assert torch.equal(ours[:1], last[0])
    assert not torch.equal(ours[1:], edit(case.reference, case, OTHER, IMAGE_SIZE)[1:]), (
        "the image has no effect"
    )


@pytest.mark.parametrize("name", EDITS)
def test_a_quantized_transformer_edits_near_bf16(
    cases: Callable[[str], Case], tmp_path: Path, name: str
) -> None:
    """Measured: 0.9989 or more."""
    case = cases(name)
    exported = {
        expert: export(getattr(case.reference, expert), largest, "fp8", tmp_path / expert)
        for expert, largest in case.largest.items()
    }
    expected, found = (
        edit(pipe, case, IMAGE_SIZE, OTHER) for pipe in (case.reference, case.load(**exported))
    )
    assert not torch.equal(found, expected)
    assert latent_cosine(expected, found) > 0.997


@pytest.mark.parametrize("kind", [f"{name}Pipeline" for name in QWEN])
def test_qwen_image_edit_is_given_the_image_too(
    cases: Callable[[str], Case], tmp_path: Path, kind: str
) -> None:
    """In memory, because `load` needs torchvision for other components. Measured: 0.999."""
    case = cases("qwenimage")
    copy = export(case.reference.transformer, case.largest["transformer"], "fp8", tmp_path / "fp8")
    pipes = [
        tiny.qwenimage_edit(kind, pipe) for pipe in (case.reference, case.load(transformer=copy))
    ]
    expected, quantized = (edit(pipe, case, IMAGE_SIZE) for pipe in pipes)
    assert latent_cosine(expected, quantized) > 0.997
    assert not torch.equal(edit(pipes[0], case, OTHER), expected)


@pytest.mark.parametrize("size", ["48x32", "32"])
def test_kontext_generates_the_size_that_is_asked_for(
    cases: Callable[[str], Case], tmp_path: Path, source_image: Path, size: str
) -> None:
    for given in ((), ("--image", source_image)):
        result = run_generate(
            cases("flux1_kontext"), *given, "--size", size, "-o", tmp_path / "a.png"
        )
        assert result.exit_code == 0, result.exception
        with Image.open(tmp_path / "a.png") as image:
            assert image.size == ((48, 32) if size == "48x32" else (32, 32))


def test_without_a_size_the_image_gives_the_shape() -> None:
    assert Sampling(1024, 1, 1).with_aspect_ratio(1600, 900) == Sampling(768, 1, 1, width=1376)
    assert Sampling(704, 1, 1, width=1280).with_aspect_ratio(64, 64) == Sampling(
        960, 1, 1, width=960
    )
    assert Sampling(32, 1, 1).with_aspect_ratio(8, 1) == Sampling(32, 1, 1, width=96), (
        "no side is 0"
    )


def test_the_image_is_among_the_parameters(
    cases: Callable[[str], Case], tmp_path: Path, source_image: Path
) -> None:
    result = run_generate(
        cases("flux2_klein"),
        "--image",
        source_image,
        "--size",
        32,
        "-o",
        tmp_path / "a.png",
        "--json",
    )
    expected = {
        "image": str(source_image),
        "image_sha256": hashlib.sha256(source_image.read_bytes()).hexdigest(),
    }
    with Image.open(tmp_path / "a.png") as image:
        parameters = json.loads(image.info["mezzotint"])
    for entries in (json.loads(result.stdout), parameters):
        assert {key: entries[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("zimage", True, "ZImagePipeline takes no source image"),
        ("wan_a14b", True, "WanPipeline takes no source image"),
        ("wan_i2v", False, "WanImageToVideoPipeline needs a source image, and none was given"),
    ],
)
def test_a_image_too_many_or_too_few_is_refused_before_anything_is_loaded(
    cases: Callable[[str], Case],
    source_image: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    given: bool,
    message: str,
) -> None:
    case = cases(name)
    monkeypatch.setattr(
        "mezzotint.generation.pipeline.load_model", lambda *_: pytest.fail("weights are read")
    )
    result = run_generate(case, *(("--image", source_image) if given else ()))
    assert isinstance(result.exception, BadRequest)
    assert message in str(result.exception)
    with pytest.raises(BadRequest, match=message):
        generate(
            case.reference,
            PROMPTS,
            sampling=case.sampling,
            source_images=[IMAGE_SIZE if given else None] * 2,
        )


def test_pipelines_that_take_an_image_are_found_by_their_signature() -> None:
    for known in source_image_pipelines():
        check_source_image(getattr(diffusers, f"{known.name}Pipeline"), has_source_image=True)
    for name in ("FluxKontextPipeline", "Flux2Pipeline", "FluxPipeline"):
        check_source_image(getattr(diffusers, name), has_source_image=False)
    with pytest.raises(
        BadRequest, match=r"FluxPipeline takes no source image(.|\n)*FluxKontext, Flux2"
    ):
        check_source_image(diffusers.FluxPipeline, has_source_image=True)
    with pytest.raises(BadRequest, match="QwenImageEditPlusPipeline needs a source image"):
        check_source_image(diffusers.QwenImageEditPlusPipeline, has_source_image=False)


def test_a_library_that_diffusers_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mezzotint.generation.pipeline_selection.find_spec", lambda _library: None)
    with pytest.raises(Unsupported, match="pip install ftfy"):
        check_source_image(diffusers.WanImageToVideoPipeline, has_source_image=True)
    with pytest.raises(Unsupported, match="pip install torchvision"):
        check_source_image(diffusers.QwenImageEditPlusPipeline, has_source_image=True)


def test_warmup_edits_too(
    cases: Callable[[str], Case], source_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wan's image to video needs an image. Only a GPU can show that compiling speeds it up."""
    monkeypatch.setattr("mezzotint.cli.warmup.speed_up_pipeline", lambda _pipe, _attention: None)
    command = [
        "warmup",
        str(cases("wan_i2v").folder),
        "--frames",
        "5",
        "--size",
        "32",
        "--device",
        "cpu",
    ]
    assert isinstance(CliRunner().invoke(app, command).exception, BadRequest)
    result = CliRunner().invoke(app, [*command, "--image", str(source_image)])
    assert "32x32: compiled" in result.stdout


def test_one_image_for_each_prompt(cases: Callable[[str], Case]) -> None:
    with pytest.raises(BadRequest, match="2 prompts and 1 images"):
        generate(cases("flux2").reference, PROMPTS, source_images=[IMAGE_SIZE])


def test_a_image_is_read_upright_and_without_alpha(tmp_path: Path) -> None:
    marked = Image.new("RGBA", (96, 64), (255, 0, 0, 128))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, as cameras do
    marked.save(tmp_path / "a.png", exif=exif)
    found = read_source_image(tmp_path / "a.png").to_pil
    assert (found.mode, found.size) == ("RGB", (64, 96))
    assert np.unique(np.asarray(found).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no such image"),
        (b"not an image", "is not a complete image"),
        (encoded(IMAGE_SIZE)[:150], "is not a complete image"),
        (encoded(Image.new("RGB", (63, 80))), "is 63 x 80 pixels"),
        (encoded(Image.new("RGB", (577, 72))), "is 577 x 72 pixels"),
    ],
)
def test_an_invalid_source_image_is_an_error(
    tmp_path: Path, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(BadRequest, match=message):
        read_source_image(tmp_path / "a.png")


def test_a_image_too_large_to_open_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    IMAGE_SIZE.save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 96 * 64 // 2 - 1)
    with pytest.raises(BadRequest, match="exceeds limit"):
        read_source_image(tmp_path / "a.png")


def test_models_that_edit_have_settings_of_their_own(cases: Callable[[str], Case]) -> None:
    kontext = cases("flux1_kontext").folder
    assert recommended_sampling(kontext).guidance == 2.5
    assert recommended_sampling(kontext, IMAGE_SIZE.resize((1600, 900))) == recommended_sampling(
        kontext
    ).replace(width=1376, height=768)
    for name in QWEN:
        assert (
            families()["qwenimage"].sampling({"_class_name": f"{name}Pipeline"}, {}).height == 1024
        )
    assert recommended_sampling(cases("flux1").folder).guidance == 3.5
