"""`mezzotint generate`: images as PNG, videos as MP4 or frames, and early errors."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from mezzotint.cli import app
from mezzotint.errors import BadRequest, Unsupported
from mezzotint.generation.video_io import save_mp4
from support.pipeline_cases import Case


@pytest.fixture(autouse=True)
def _disable_output_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights generate noise, which the output check rejects; only files matter here."""
    monkeypatch.setattr("mezzotint.generation.generate.find_problems", lambda _frames, _latents: ())


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, ["generate", *map(str, arguments), "--device", "cpu", "--steps", "2"]
    )


def ffmpeg(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", *arguments], capture_output=True
    )


def frames_of(video: Path, width: int, height: int) -> np.ndarray:
    """[frames, height, width, 3]"""
    pixels = ffmpeg("-i", str(video), "-f", "rawvideo", "-pix_fmt", "rgb24", "-").stdout
    return np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3)


def facts_of(video: Path) -> str:
    return ffmpeg("-i", str(video)).stderr.decode()


def test_a_image_is_a_png_that_holds_its_parameters(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    output = tmp_path / "fox.png"
    result = run("a red fox", "--model", cases("zimage").folder, "--size", "32x16", "-o", output)
    assert result.stdout == f"{output}\n"
    with Image.open(output) as image:
        assert image.size == (32, 16)
        assert json.loads(image.info["mezzotint"])["prompt"] == "a red fox"


def test_a_video_is_an_mp4(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("wan_a14b")
    output = tmp_path / "fox.mp4"
    second = ("--transformer-2", case.folder / "transformer_2")
    result = run(
        "a red fox",
        "--model",
        case.folder,
        *second,
        "--size",
        32,
        "--frames",
        5,
        "-o",
        output,
        "--json",
    )
    assert json.loads(result.stdout)["load_2"]["path"] == str(case.folder / "transformer_2")
    assert frames_of(output, 32, 32).shape == (5, 32, 32, 3)
    assert "h264" in facts_of(output)
    assert "16 fps" in facts_of(output)
    assert '"prompt": "a red fox"' in facts_of(output)


def test_a_video_is_a_folder_of_frames(cases: Callable[[str], Case], tmp_path: Path) -> None:
    folder = cases("wan_ti2v").folder
    run("a red fox", "rain", "--model", folder, "--size", 32, "--frames", 5, "-o", tmp_path / "fox")
    assert [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("fox-1", "fox-2")] == [
        [f"frame-000{i}.png" for i in range(5)]
    ] * 2


def test_frames_survive_the_mp4(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    frames = [
        Image.fromarray(np.stack([np.full_like(ramp, 40 * i), ramp, np.zeros_like(ramp)], 2))
        for i in range(6)
    ]
    save_mp4(frames, tmp_path / "a.mp4", 16, {"prompt": "a"})
    difference = frames_of(tmp_path / "a.mp4", 64, 64).astype(int) - np.stack(
        [np.array(frame) for frame in frames]
    )
    assert np.abs(difference).mean() < 8, "H.264 at this quality, colors at half the resolution"


def test_odd_frames_do_not_fit_into_an_mp4(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="33 x 32"):
        save_mp4([Image.new("RGB", (33, 32))], tmp_path / "a.mp4", 16, {})


def test_what_the_encoder_says_is_the_error(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"could not be encoded: .*ramerate"):
        save_mp4([Image.new("RGB", (32, 32))], tmp_path / "a.mp4", 0, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("wan_ti2v", ["-o", "a.png"], "generates videos"),
        ("wan_ti2v", ["--grid"], "--grid applies to images"),
        ("wan_ti2v", ["-o", "."], "that folder is not empty"),
        ("zimage", ["-o", "a.mp4"], "generates images"),
        ("zimage", ["--frames", 5], "--frames is for videos"),
        ("zimage", ["--size", "8"], "--size is '8'"),
        ("zimage", ["--size", "64x64x64"], "--size is '64x64x64'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    cases: Callable[[str], Case], name: str, arguments: list[object], message: str
) -> None:
    result = run("a", "--model", cases(name).folder, *arguments)
    assert isinstance(result.exception, BadRequest)
    assert message in str(result.exception)
