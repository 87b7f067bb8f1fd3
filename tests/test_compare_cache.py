"""What `compare` has painted counts only if it is what was written, and one process at a time works in a folder."""

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

from cases import Case
from mezzotint.costs import Laps
from mezzotint.errors import BadRequest, BrokenFile, CannotWrite
from mezzotint.painting import Painting
from mezzotint.pipelines import sampling_of
from mezzotint.quality import runs
from mezzotint.quality.alone import alone_in
from mezzotint.quality.candidate import Candidate, read_sources
from mezzotint.quality.kept import read_record, write_record
from mezzotint.quality.resident import Resident
from mezzotint.quality.runs import Run, Shot, paint_run

CPU = torch.device("cpu")
SHOTS = (Shot("a large red circle on a blue background", 0), Shot("a small green triangle on a yellow background", 0))
(DEMO,) = read_sources("demo", [])
RESIDENT = Resident({}, {}, 0.0, 16.0, 16.0, 0)


def fake_painting(seed: int, number: int) -> tuple[Painting, torch.Tensor, Laps]:
    """An image and latents that are others for each seed and prompt, and the same each time."""
    pixels = np.random.default_rng((seed, number)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    latents = torch.full((2, 1, 4), float(number))
    return Painting([Image.fromarray(pixels)], latents[-1], [], None, ((),)), latents, Laps(0.1, (0.1, 0.1), 0.1)


def painted(folder: Path, candidate: Candidate = DEMO, shots: tuple[Shot, ...] = SHOTS) -> tuple[Run, int]:
    """(the run, how many shots were painted and not found); no model is loaded, which is tests/test_compare.py's."""
    count = 0

    def fake(_pipe: object, _run: Run, shot: Shot, _device: torch.device) -> tuple[Painting, torch.Tensor, Laps]:
        nonlocal count
        count += 1
        return fake_painting(shot.seed, shots.index(shot))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Candidate, "load", lambda *_: SimpleNamespace(load_report=None, load_report_2=None))
        patch.setattr(runs, "paint", lambda *_, **_options: None)
        patch.setattr(runs, "resident", lambda _pipe: RESIDENT)
        patch.setattr(runs, "_paint_one", fake)
        run = paint_run(folder, candidate, shots, sampling_of("demo").but(steps=2), CPU, lambda _name: None)
    return run, count


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A folder of runs with two shots."""
    folder = tmp_path / "sound"
    assert painted(folder)[1] == 2
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
    return [run_folder(folder) / f"{shot.key}{suffix}" for shot in SHOTS]


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


def test_what_is_sound_is_not_painted_again(folder: Path) -> None:
    assert painted(folder)[1] == 0


@pytest.mark.parametrize("suffix", [".png", ".safetensors", ".json"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_damaged_shot_is_painted_again_alone(
    folder: Path, sound: Path, suffix: str, damage: Callable[[Path], None]
) -> None:
    damage(files_of(folder, suffix)[1])
    assert painted(folder)[1] == 1
    assert contents(folder) == contents(sound)
    assert painted(folder)[1] == 0


@pytest.mark.parametrize("suffixes", [[".png"], [".safetensors"], [".json"], [".png", ".safetensors", ".json"]])
def test_swapped_shots_are_painted_again(folder: Path, sound: Path, suffixes: list[str]) -> None:
    for suffix in suffixes:
        swap(*files_of(folder, suffix))
    assert painted(folder)[1] == 2
    assert contents(folder) == contents(sound)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"a"', "[" * 100_000, "\\xff", '{"sha256": 1}', "9" * 5000])
def test_facts_that_are_none_are_found_out_again(folder: Path, text: str) -> None:
    file = run_folder(folder) / "run.json"
    before = json.loads(file.read_text())
    file.write_bytes(text.encode("latin-1").replace(b"\\xff", b"\xff"))
    run, count = painted(folder)
    assert count == 1
    assert run.facts["resident"] == before["resident"]


def test_an_edited_run_json_is_not_believed(folder: Path) -> None:
    file = run_folder(folder) / "run.json"
    entries = json.loads(file.read_text())
    entries["resident"]["quantized_share"] = 1.0
    entries["claims"] = ["config.json: FP8"]
    file.write_text(json.dumps(entries))
    assert painted(folder)[0].facts["claims"] == []


def test_another_models_run_is_not_believed(folder: Path) -> None:
    """A whole folder of the built-in model where that of its FP8 copy belongs, and shots of it in there."""
    _, candidate = read_sources("demo", ["demo-fp8"])
    run, count = painted(folder, candidate)
    assert count == 2
    other = next(one for one in folder.iterdir() if one.is_dir() and one != run.folder)
    for file in other.iterdir():
        if file.name != "run.json":
            shutil.copy(file, run.folder / file.name)
    assert painted(folder, candidate)[1] == 2
    shutil.rmtree(run.folder)
    shutil.copytree(other, run.folder)
    assert painted(folder, candidate)[1] == 2


def test_folders_where_files_belong_are_replaced(folder: Path, sound: Path) -> None:
    for suffix in (".png", ".safetensors", ".json"):
        file = files_of(folder, suffix)[0]
        file.unlink()
        (file / "in it").mkdir(parents=True)
    assert painted(folder)[1] == 1
    assert contents(folder) == contents(sound)


def test_what_is_damaged_while_it_is_used_is_an_error(folder: Path) -> None:
    run, _ = painted(folder)
    flip(files_of(folder, ".json")[0])
    with pytest.raises(BrokenFile, match="was damaged or removed after it was written"):
        run.painted(SHOTS[0])


def test_temporary_files_of_a_killed_process_are_removed(folder: Path) -> None:
    left = run_folder(folder) / f".{SHOTS[0].key}.png.x7.png"
    left.write_bytes(b"half")
    assert painted(folder)[1] == 0
    assert not left.exists()


def test_a_killed_video_goes_on(cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary frame that a kill left behind is no frame, and neither is what an earlier try has written."""
    case = cases("wan_ti2v")
    (candidate,) = read_sources(str(case.folder), [])
    sampling = sampling_of(candidate.model).but(steps=1, num_frames=5, size=32, width=32)
    shot = Shot("a red fox", 0)

    def killed(frames: object, folder: Path, parameters: object) -> None:
        folder.mkdir(parents=True)
        for name in ("frame-0000.png", ".frame-0001.png.abc.png", "frame-0099.png"):
            (folder / name).write_bytes(b"half")
        raise KeyboardInterrupt

    def run() -> Run:
        return paint_run(tmp_path, candidate, [shot], sampling, CPU, lambda _name: None)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_frames", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    found = run()
    assert [file.name for file in found.frame_files(shot)] == [f"frame-000{i}.png" for i in range(5)]
    assert len(found.painted(shot).frames) == 5
    (found.folder / shot.key / ".frame-0001.png.abc.png").write_bytes(b"half")
    assert len(run().frames(shot)) == 5


def test_a_record_is_what_was_written_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, {"a": [1, 2.5, None], "b": "ü"})
    assert read_record(path) == {"a": [1, 2.5, None], "b": "ü"}
    text = path.read_text()
    for changed in (text.replace("2.5", "2.6"), text.replace('"a"', '"c"'), text[:-3], text.replace('"sha256"', '"x"')):
        path.write_text(changed)
        assert read_record(path) is None
    path.unlink()
    os.mkfifo(path)
    assert read_record(path) is None


def test_a_second_process_is_told_who_is_in_the_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path):
        expected = rf"process {os.getpid()} on .* is comparing in this folder(.|\n)*its own folder with -o"
        with pytest.raises(BadRequest, match=expected), alone_in(tmp_path):
            pass
    with alone_in(tmp_path):
        pass
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").mkdir()
    with pytest.raises(CannotWrite, match=re.escape(str(tmp_path / "lock"))), alone_in(tmp_path):
        pass
