"""`compare` only uses stored images that it wrote, and locks its folder for one process."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.costs import StageTimes
from mezzotint.errors import BadRequest, BrokenFile, CannotWrite
from mezzotint.generation.generate import GenerationResult
from mezzotint.generation.pipeline import recommended_sampling
from mezzotint.quality.candidate import ModelSpec, parse_sources
from mezzotint.quality.compare import runs
from mezzotint.quality.compare.folder_lock import lock_folder
from mezzotint.quality.compare.records import read_record, write_record
from mezzotint.quality.compare.runs import ImageRequest, Run, generate_run
from mezzotint.quality.resident import Resident
from support.pipeline_cases import Case

pytestmark = pytest.mark.usefixtures("encoders_loaded_once")
CPU = torch.device("cpu")
REQUESTS = (
    ImageRequest("a large red circle on a blue background", 0),
    ImageRequest("a small green triangle on a yellow background", 0),
)
(DEMO,) = parse_sources("demo", [])
RESIDENT = Resident({}, {}, 0.0, 16.0, 16.0, 0)


def fake_result(seed: int, number: int) -> tuple[GenerationResult, torch.Tensor, StageTimes]:
    """An image and latents that are others for each seed and prompt, and the same each time."""
    pixels = np.random.default_rng((seed, number)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    latents = torch.full((2, 1, 4), float(number))
    return (
        GenerationResult([Image.fromarray(pixels)], latents[-1], [], None, ((),)),
        latents,
        StageTimes(0.1, (0.1, 0.1), 0.1),
    )


def generate_run_outputs(
    folder: Path, candidate: ModelSpec = DEMO, requests: tuple[ImageRequest, ...] = REQUESTS
) -> tuple[Run, int]:
    """Return the run, and the number of requests that were generated and not found.

    No model is loaded; tests/quality/test_compare.py does that.
    """
    count = 0

    def fake(
        _pipe: object, _run: Run, request: ImageRequest, _device: torch.device
    ) -> tuple[GenerationResult, torch.Tensor, StageTimes]:
        nonlocal count
        count += 1
        return fake_result(request.seed, requests.index(request))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelSpec, "load", lambda *_: SimpleNamespace(pipe=None, reports={}))
        patch.setattr(runs, "generate", lambda *_, **_options: None)
        patch.setattr(runs, "measure_resident", lambda _pipe: RESIDENT)
        patch.setattr(runs, "_generate_one", fake)
        run = generate_run(
            folder,
            candidate,
            requests,
            recommended_sampling("demo").replace(steps=2),
            CPU,
            lambda _name: None,
        )
    return run, count


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A folder of runs with two requests."""
    folder = tmp_path / "sound"
    assert generate_run_outputs(folder)[1] == 2
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "runs"))


def contents(folder: Path) -> dict[str, bytes]:
    """{path: bytes} of images and latents."""
    files = [file for file in folder.rglob("*") if file.suffix in (".png", ".safetensors")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def run_folder(folder: Path) -> Path:
    (found,) = (one for one in folder.iterdir() if one.is_dir())
    return found


def files_of(folder: Path, suffix: str) -> list[Path]:
    return [run_folder(folder) / f"{request.key}{suffix}" for request in REQUESTS]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def test_what_is_sound_is_not_generated_again(folder: Path) -> None:
    assert generate_run_outputs(folder)[1] == 0


@pytest.mark.parametrize("suffix", [".png", ".safetensors", ".json"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_damaged_request_is_generated_again_alone(
    folder: Path, sound: Path, suffix: str, damage: Callable[[Path], None]
) -> None:
    damage(files_of(folder, suffix)[1])
    assert generate_run_outputs(folder)[1] == 1
    assert contents(folder) == contents(sound)
    assert generate_run_outputs(folder)[1] == 0


@pytest.mark.parametrize(
    "suffixes", [[".png"], [".safetensors"], [".json"], [".png", ".safetensors", ".json"]]
)
def test_swapped_requests_are_generated_again(
    folder: Path, sound: Path, suffixes: list[str]
) -> None:
    for suffix in suffixes:
        swap(*files_of(folder, suffix))
    assert generate_run_outputs(folder)[1] == 2
    assert contents(folder) == contents(sound)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"a"', "[" * 100_000, "\\xff", '{"sha256": 1}', "9" * 5000]
)
def test_facts_that_are_none_are_found_out_again(folder: Path, text: str) -> None:
    file = run_folder(folder) / "run.json"
    before = json.loads(file.read_text())
    file.write_bytes(text.encode("latin-1").replace(b"\\xff", b"\xff"))
    run, count = generate_run_outputs(folder)
    assert count == 1
    assert run.info["resident"] == before["resident"]


def test_an_edited_run_json_is_not_believed(folder: Path) -> None:
    file = run_folder(folder) / "run.json"
    entries = json.loads(file.read_text())
    entries["resident"]["quantized_share"] = 1.0
    entries["claims"] = ["config.json: FP8"]
    file.write_text(json.dumps(entries))
    assert generate_run_outputs(folder)[0].info["claims"] == []


def test_another_models_run_is_not_believed(folder: Path) -> None:
    """The folder of the built-in model in place of that of its FP8 copy, and requests for it."""
    _, candidate = parse_sources("demo", ["demo-fp8"])
    run, count = generate_run_outputs(folder, candidate)
    assert count == 2
    other = next(one for one in folder.iterdir() if one.is_dir() and one != run.folder)
    for file in other.iterdir():
        if file.name != "run.json":
            shutil.copy(file, run.folder / file.name)
    assert generate_run_outputs(folder, candidate)[1] == 2
    shutil.rmtree(run.folder)
    shutil.copytree(other, run.folder)
    assert generate_run_outputs(folder, candidate)[1] == 2


def test_folders_where_files_belong_are_replaced(folder: Path, sound: Path) -> None:
    for suffix in (".png", ".safetensors", ".json"):
        file = files_of(folder, suffix)[0]
        file.unlink()
        (file / "in it").mkdir(parents=True)
    assert generate_run_outputs(folder)[1] == 1
    assert contents(folder) == contents(sound)


def test_what_is_damaged_while_it_is_used_is_an_error(folder: Path) -> None:
    run, _ = generate_run_outputs(folder)
    flip(files_of(folder, ".json")[0])
    with pytest.raises(BrokenFile, match="was damaged or removed after it was written"):
        run.output(REQUESTS[0])


def test_temporary_files_of_a_killed_process_are_removed(folder: Path) -> None:
    left = run_folder(folder) / f".{REQUESTS[0].key}.png.x7.png"
    left.write_bytes(b"half")
    assert generate_run_outputs(folder)[1] == 0
    assert not left.exists()


def test_a_killed_video_goes_on(
    cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary frame of a killed run is no frame, and nor is a frame of an earlier attempt."""
    case = cases("wan_ti2v")
    (candidate,) = parse_sources(str(case.folder), [])
    sampling = recommended_sampling(candidate.model).replace(
        steps=1, num_frames=5, height=32, width=32
    )
    request = ImageRequest("a red fox", 0)

    def killed(frames: object, folder: Path, parameters: object) -> None:
        folder.mkdir(parents=True)
        for name in ("frame-0000.png", ".frame-0001.png.abc.png", "frame-0099.png"):
            (folder / name).write_bytes(b"half")
        raise KeyboardInterrupt

    def run() -> Run:
        return generate_run(tmp_path, candidate, [request], sampling, CPU, lambda _name: None)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_frames", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    found = run()
    assert [file.name for file in found.frame_files(request)] == [
        f"frame-000{i}.png" for i in range(5)
    ]
    assert len(found.output(request).frames) == 5
    (found.folder / request.key / ".frame-0001.png.abc.png").write_bytes(b"half")
    assert len(run().frames(request)) == 5


def test_a_record_is_what_was_written_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, {"a": [1, 2.5, None], "b": "ü"})
    assert read_record(path) == {"a": [1, 2.5, None], "b": "ü"}
    text = path.read_text()
    for changed in (
        text.replace("2.5", "2.6"),
        text.replace('"a"', '"c"'),
        text[:-3],
        text.replace('"sha256"', '"x"'),
    ):
        path.write_text(changed)
        assert read_record(path) is None
    path.unlink()
    os.mkfifo(path)
    assert read_record(path) is None


def test_a_second_process_is_told_who_is_in_the_folder(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        expected = (
            rf"process {os.getpid()} on .* is comparing in this folder(.|\n)*"
            "a separate folder for each with -o"
        )
        with pytest.raises(BadRequest, match=expected), lock_folder(tmp_path):
            pass
    with lock_folder(tmp_path):
        pass
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").mkdir()
    with pytest.raises(CannotWrite, match=re.escape(str(tmp_path / "lock"))), lock_folder(tmp_path):
        pass
