"""The output check: every kind of broken image is detected, and good images pass."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import mezzotint
from demo_model import shapes
from mezzotint.builtin import resolve
from mezzotint.errors import BadOutput
from mezzotint.generation.generate import generate
from mezzotint.generation.output_check import find_problems
from mezzotint.generation.pipeline import load, recommended_sampling
from support.checkpoint_edits import WEIGHTS, rewrite
from support.cli_runner import run

SOUND = torch.zeros(1, 4)
PROMPT = "a large red circle on a blue background"
PHOTOGRAPHS = sorted(
    file for kind in ("png", "jpg") for file in Path(skimage.data.__file__).parent.glob(f"*.{kind}")
)


def generated_images(count: int) -> Iterator[Image.Image]:
    """Images of the built-in model, 8 steps, each of another caption and seed.

    In float32, because a CPU without AVX-512 has no fast GEMM for BF16.
    """
    pipe = load("demo", device="cpu", dtype=torch.float32)
    settings = {"height": 64, "width": 64, "guidance_scale": 3.5, "max_sequence_length": 16}
    captions = shapes.split_captions(count)[1]
    for start in range(0, count, 40):
        batch = captions[start : start + 40]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        yield from pipe(prompt=batch, generator=seeds, num_inference_steps=8, **settings).images


def decoded_noise(count: int) -> Iterator[Image.Image]:
    """Yield the built-in model's decoded initial noise."""
    pipe = load("demo", device="cpu", dtype=torch.float32)
    latents = torch.randn(
        count, pipe.vae.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        pixels = pipe.vae.decode(
            (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
        ).sample
    yield from pipe.image_processor.postprocess(pixels)


def of(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def noise(seed: int) -> dict[str, Image.Image]:
    random = np.random.default_rng(seed)
    cells = random.integers(0, 256, (16, 16, 3)).repeat(4, 0).repeat(4, 1)
    return {
        "uniform": of(random.integers(0, 256, (64, 64, 3))),
        "Gaussian": of(random.normal(128, 40, (64, 64, 3))),
        "faint": of(random.normal(128, 10, (64, 64, 3))),
        "gray": of(random.integers(0, 256, (64, 64, 1)).repeat(3, 2)),
        "black and white": of((random.random((64, 64, 1)) < 0.5).repeat(3, 2) * 255),
        "by latent": of(cells),
        "wide": of(random.integers(0, 256, (256, 512, 3))),
    }


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_named(seed: int) -> None:
    for kind, image in noise(seed).items():
        assert any("noise" in problem for problem in find_problems([image], SOUND)), kind


def test_decoded_noise_is_named() -> None:
    missed = [image for image in decoded_noise(200) if not find_problems([image], SOUND)]
    assert not missed


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (127, 127, 127), (20, 200, 90)])
def test_a_single_color_is_named(color: tuple[int, int, int]) -> None:
    flat = np.broadcast_to(color, (64, 64, 3))
    dithered = flat + np.random.default_rng(0).integers(-1, 2, (64, 64, 3))
    for pixels in (flat, dithered):
        assert f"a single color, RGB {', '.join(map(str, color))}" in find_problems(
            [of(pixels)], SOUND
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_latents_that_are_no_numbers_are_named(value: float) -> None:
    latents = torch.tensor([[0.0, 1.0, value, 2.0]], dtype=torch.bfloat16)
    assert find_problems([shapes.render(PROMPT)], latents) == (
        "1 of 4 latents are NaN or infinite",
    )


def test_saturation_is_named() -> None:
    halves = np.zeros((64, 64, 3))
    halves[:, 32:] = 255
    assert find_problems([of(halves)], SOUND) == ("saturated: 100.0% of all values are 0 or 255",)


def test_a_video_has_what_most_of_its_frames_have() -> None:
    sound, black = shapes.render(PROMPT), Image.new("RGB", (64, 64))
    assert find_problems([black, sound, sound], SOUND) == ()
    assert find_problems([black, black, sound], SOUND) == ("a single color, RGB 0, 0, 0",)


@pytest.mark.parametrize("file", PHOTOGRAPHS, ids=lambda file: file.name)
def test_photographs_pass(file: Path) -> None:
    with Image.open(file) as image:
        assert find_problems([image], SOUND) == ()


def test_what_the_built_in_model_generates_passes() -> None:
    assert [find_problems([image], SOUND) for image in generated_images(40)] == [()] * 40


@pytest.mark.slow
def test_at_most_one_of_1000_sound_images_is_named() -> None:
    """Found: none. 45 s on two cores."""
    assert sum(bool(find_problems([image], SOUND)) for image in generated_images(1000)) <= 1


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The built-in transformer with one NaN in a bias."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in (resolve("demo") / "transformer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    rewrite(folder, lambda tensors: tensors["proj_out.bias"][:1].fill_(float("nan")))
    assert (folder / WEIGHTS).exists()
    return folder


def test_generate_refuses_nan_and_gives_it_on_request(broken: Path) -> None:
    pipe = mezzotint.load("demo", transformer=broken, device="cpu")
    settings = recommended_sampling("demo").replace(steps=1)
    with pytest.raises(BadOutput, match=r"1 of 1 outputs are unusable: 'a large red circle.*NaN"):
        generate(pipe, [PROMPT], sampling=settings)
    generated = generate(pipe, [PROMPT], sampling=settings, check_output=False)
    assert "NaN" in generated.problems[0][0]
    assert len(generated.images) == 1


@pytest.mark.parametrize("extra", [[], ["--grid"]])
def test_generate_keeps_what_it_objects_to_under_another_name(
    broken: Path, tmp_path: Path, extra: list[str]
) -> None:
    done = run(
        "generate",
        PROMPT,
        "--transformer",
        str(broken),
        "--steps",
        "1",
        "-o",
        "out.png",
        *extra,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1
    assert "NaN" in done.stderr
    assert "out-bad-output.png" in done.stderr
    assert [file.name for file in tmp_path.glob("*.png")] == ["out-bad-output.png"]
