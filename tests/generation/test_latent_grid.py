"""Invalid sizes raise an error with the nearest valid ones; a truncated prompt causes a note."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mezzotint
from mezzotint.errors import BadRequest, Unsupported
from mezzotint.families import Sampling, families
from mezzotint.families.latent_grid import LatentGrid
from mezzotint.generation.generate import generate
from mezzotint.generation.pipeline import recommended_sampling
from mezzotint.generation.pipeline_index import VAE
from mezzotint.generation.source import PipelineSource
from mezzotint.quality.compare import compare
from mezzotint.quality.diagnose import diagnose
from support.cli_runner import run
from support.pipeline_cases import Case

CAPTION = "a large red circle on a blue background"
FAMILIES = ("flux1", "flux2", "flux2_klein", "zimage", "qwenimage", "wan_a14b", "wan_ti2v")
GRIDS = {
    "FLUX.1": (
        {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]},
        {},
        (16, 16, 1),
    ),
    "FLUX.2": (
        {"_class_name": "AutoencoderKLFlux2", "block_out_channels": [1, 2, 3, 4]},
        {"patch_size": 1},
        (16, 16, 1),
    ),
    "Z-Image": ({"_class_name": "AutoencoderKL"}, {"all_patch_size": [2]}, (16, 16, 1)),
    "Qwen-Image": ({"_class_name": "AutoencoderKLQwenImage"}, {"patch_size": 2}, (16, 16, 1)),
    "Wan 2.2 A14B": ({"_class_name": "AutoencoderKLWan"}, {"patch_size": [1, 2, 2]}, (16, 16, 4)),
    "Wan 2.2 TI2V": (
        {"_class_name": "AutoencoderKLWan", "scale_factor_spatial": 16, "scale_factor_temporal": 4},
        {"patch_size": [1, 2, 2]},
        (32, 32, 4),
    ),
}
"""Published configurations; entries that they omit have the class's defaults."""


def config(folder: Path, component: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / component / "config.json").read_text())
    return found


@pytest.mark.parametrize("model", GRIDS)
def test_the_grid_of_published_models(
    model: str,
) -> None:
    vae, transformer, expected = GRIDS[model]
    family = next(f for f in families().values() if model.startswith(f.title))
    assert family.latent_grid(vae, transformer) == LatentGrid(*expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_grid_is_the_one_of_diffusers_pipeline(cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    family = families()[name.partition("_")[0]]
    grid = family.latent_grid(config(case.folder, VAE), config(case.folder, "transformer"))
    pipe = case.reference
    if name.startswith("wan"):
        side = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]
        assert grid == LatentGrid(side, side, pipe.vae_scale_factor_temporal)
    else:
        assert grid == LatentGrid(2 * pipe.vae_scale_factor, 2 * pipe.vae_scale_factor)


@given(st.integers(16, 8192), st.integers(16, 8192), st.integers(1, 400))
def test_what_is_not_refused_is_whole_cells_and_what_is_names_sizes_that_are(
    width: int, height: int, frames: int
) -> None:
    grid = LatentGrid(32, 16, 4)
    sampling = Sampling(height=height, steps=1, guidance=1.0, width=width, num_frames=frames)
    if width % 16 == height % 32 == (frames - 1) % 4 == 0:
        return grid.check(sampling)
    with pytest.raises(BadRequest) as refused:
        grid.check(sampling)
    named = refused.value.hint.removeprefix("the nearest are ").rstrip(".").split(" and ")
    field = (
        "num_frames"
        if "frames" in refused.value.message
        else "width"
        if "width" in refused.value.message
        else "height"
    )
    near = [
        sampling.replace(**{"width": width, "height": height, field: int(number)})
        for number in named
    ]
    for other in near:
        assert abs(getattr(other, field) - getattr(sampling, field)) < 32
    return None


@pytest.mark.parametrize(
    ("size", "nearest"), [("100", "96 and 104"), ("64x60", "56 and 64"), ("60x64", "56 and 64")]
)
def test_a_size_between_grid_cells_is_refused(size: str, nearest: str, tmp_path: Path) -> None:
    """--size 100 gave 96 x 96 pixels, with 100 among the parameters in the file."""
    done = run("generate", CAPTION, "--size", size, "-o", "a.png", cwd=tmp_path)
    assert done.returncode == 2
    assert f"the nearest are {nearest}." in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["96", "72x64"])
def test_the_parameters_in_a_file_are_the_size_that_it_has(size: str, tmp_path: Path) -> None:
    done = run(
        "generate",
        CAPTION,
        "--steps",
        "1",
        "--size",
        size,
        "-o",
        "a.png",
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    assert done.returncode in (0, 1), done.stderr
    (file,) = tmp_path.iterdir()
    with Image.open(file) as image:
        parameters = json.loads(image.info["mezzotint"])
        assert image.size == (parameters["width"], parameters["height"])


def test_every_command_and_the_api_refuse_such_a_size(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match="100 pixels"):
        compare("demo", ["demo-fp8"], tmp_path, size={"width": 64, "height": 100}, device="cpu")
    with pytest.raises(BadRequest, match="100 pixels"):
        diagnose("demo", "demo-fp8", size={"width": 64, "height": 100}, device="cpu")
    pipe = mezzotint.load("demo", device="cpu")
    with pytest.raises(BadRequest, match="100 pixels"):
        generate(pipe, [CAPTION], sampling=recommended_sampling("demo").replace(height=100))
    assert run("warmup", "--size", "64", "--size", "100", "--device", "cpu").returncode == 2
    with pytest.raises(BadRequest, match="takes 1 plus multiples of 4") as refused:
        PipelineSource.open(cases("wan_ti2v").folder).sampling(num_frames=6)
    assert refused.value.hint == "the nearest are 5 and 9."
    with pytest.raises(BadRequest, match="--frames is for videos"):
        PipelineSource.open("demo").sampling(num_frames=5)


def test_diagnose_takes_a_size_and_frames(cases: Callable[[str], Case]) -> None:
    settings = diagnose(
        "demo",
        "demo-fp8",
        size={"width": 32, "height": 64},
        steps=1,
        layers="*proj_mlp",
        device="cpu",
    ).settings
    assert (settings["size"], settings["frames"]) == ([32, 64], None)
    folder = cases("wan_ti2v").folder
    found = run(
        "diagnose",
        f"a={folder}",
        f"b={folder}",
        "--size",
        "32",
        "--frames",
        "5",
        "--steps",
        "1",
        "--json",
    )
    assert json.loads(found.stdout)["settings"]["frames"] == 5, found.stderr


def test_a_prompt_that_is_cut_is_noted(tmp_path: Path) -> None:
    long = f"{CAPTION} {'and more of it ' * 5}"
    done = run(
        "generate",
        long,
        CAPTION,
        "--steps",
        "1",
        "-o",
        "a.png",
        "--json",
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    notes = json.loads(done.stdout)["notes"]
    assert len(notes) == 2
    assert all("reads 16 tokens, and it has" in note for note in notes)
    assert all(f"note: {note}" in done.stderr for note in notes)
    assert (
        run("generate", CAPTION, "--steps", "1", "-o", "b.png", cwd=tmp_path).stderr.count("is cut")
        == 0
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_prompt_is_noted_for_every_family(cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    generated = generate(
        case.reference,
        ["x" * 600, "rain"],
        sampling=case.sampling.replace(steps=1),
        check_output=False,
    )
    assert generated.notes
    assert all(note.startswith(f"'{'x' * 60}...' is cut: tokenizer") for note in generated.notes)


@pytest.mark.parametrize(
    ("metric", "reason"), [("lpips", "needs torchvision"), ("ms_ssim", "needs sides of 161 pixels")]
)
def test_a_metric_that_is_asked_for_and_cannot_be_had_is_an_error_up_front(
    metric: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mezzotint.quality.metrics.image._lpips_unavailable",
        lambda: "needs torchvision, not installed",
    )
    with pytest.raises(Unsupported, match=f"--metrics contains {metric}, which {reason}"):
        compare("demo", ["demo-fp8"], tmp_path, metrics=["psnr", metric], device="cpu")
    assert not list(tmp_path.iterdir())
