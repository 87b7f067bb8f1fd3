"""`generate`, `compare`, `bench` and `demo` only overwrite files that Mezzotint wrote."""

import json
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from mezzotint.cli.outputs import (
    check_generated,
    check_report,
    check_rows,
    check_sheet,
    check_trace,
    is_generated,
)
from mezzotint.errors import BadRequest
from mezzotint.generation.image_io import save_png
from mezzotint.generation.video_io import save_mp4
from support.child_process import in_a_child, write_half

IMAGE = Image.new("RGB", (32, 32), "red")
PARAMETERS = {"prompt": "a", "seed": 0}


def foreign_png(path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20")
    IMAGE.save(path, pnginfo=info)


@pytest.mark.parametrize("name", ["out.png", "out-1.png", "out-2-bad-output.png"])
@pytest.mark.parametrize("kind", ["png", "text", "empty", "link", "folder"])
def test_a_foreign_image_is_not_written_over(tmp_path: Path, name: str, kind: str) -> None:
    path, number = tmp_path / name, 1 if name == "out.png" else 2
    save_png(IMAGE, tmp_path / "ours.png", PARAMETERS)
    {
        "png": lambda: foreign_png(path),
        "text": lambda: path.write_text("mezzotint"),
        "empty": path.touch,
        "link": lambda: path.symlink_to("ours.png"),
        "folder": lambda: (path / "inside").mkdir(parents=True),
    }[kind]()
    with pytest.raises(BadRequest, match=r"was not written by Mezzotint"):
        check_generated(tmp_path / "out.png", number, "-bad-output")


def test_our_own_images_and_videos_are_written_over(tmp_path: Path) -> None:
    save_png(IMAGE, tmp_path / "out.png", PARAMETERS)
    save_mp4([IMAGE] * 3, tmp_path / "out.mp4", 16, PARAMETERS)
    (tmp_path / "frames").mkdir()
    for name in ("out.png", "out.mp4", "frames", "new.png"):
        check_generated(tmp_path / name, 1, "-bad-output")


def test_a_video_of_someone_else_is_not_ours(tmp_path: Path) -> None:
    save_mp4([IMAGE] * 3, tmp_path / "comment.mp4", 16, {"title": "holiday"})
    (tmp_path / "text.mp4").write_bytes(b"\xa9cmt\0\0\0\x15data\0\0\0\1\0\0\0\0{{{{{")
    (tmp_path / "empty.mp4").touch()
    assert not any(is_generated(file) for file in tmp_path.iterdir())


def test_leftovers_of_a_killed_generate_are_removed_before_the_next(tmp_path: Path) -> None:
    in_a_child(lambda: write_half(tmp_path / "out.png"))
    assert len(list(tmp_path.iterdir())) == 1
    check_generated(tmp_path / "out.png", 1, "-bad-output")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["a note\n", '{"case": {}, "call_ms": {}}', '{"a": 1}\n', "[]\n", "\xff"]
)
def test_bench_appends_to_its_own_rows_only(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows").write_text(text, encoding="latin-1")
    with pytest.raises(BadRequest, match="not written by Mezzotint"):
        check_rows(tmp_path / "rows")
    (tmp_path / "rows").write_text('{"case": {}, "call_ms": {}, "b": 1}\n' * 3)
    for name in ("rows", "new"):
        check_rows(tmp_path / name)


def test_a_trace_replaces_nothing(tmp_path: Path) -> None:
    check_trace(tmp_path / "trace.json")
    (tmp_path / "trace.json").write_text('{"traceEvents": []}')
    with pytest.raises(BadRequest, match="is there, and not"):
        check_trace(tmp_path / "trace.json")


def test_compare_resumes_in_a_folder_of_its_own_only(tmp_path: Path) -> None:
    check_report(tmp_path / "new", "runs")
    check_report(tmp_path, "runs")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadRequest, match="compare has generated nothing there"):
        check_report(tmp_path, "runs")
    (tmp_path / "runs").mkdir()
    check_report(tmp_path, "runs")


@pytest.mark.parametrize("name", ["report.html", "report.json", "report.md", "sheet.png"])
def test_a_report_of_someone_else_is_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / name).write_text("{}")
    with pytest.raises(BadRequest, match=name):
        check_report(tmp_path, "runs")


def test_our_own_report_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "report.html").write_text("<title>pass: a compared by Mezzotint</title>")
    (tmp_path / "report.json").write_text(
        json.dumps({"schema": 1, "verdict": "pass", "noise_floor": {}})
    )
    (tmp_path / "report.md").write_text("# PASS")
    save_png(IMAGE, tmp_path / "sheet.png", {})
    check_report(tmp_path, "runs")


def test_demo_replaces_its_own_sheet_and_table_only(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(BadRequest, match=r"demo\.json"):
        check_sheet(tmp_path / "demo.png")
    save_png(IMAGE, tmp_path / "demo.png", {"prompt": "mezzotint demo"})
    check_sheet(tmp_path / "demo.png")


def test_an_earlier_image_that_will_be_replaced_is_named(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    assert check_generated(image, 1, "-bad-output") == []
    save_png(Image.new("RGB", (8, 8)), image, {"prompt": "p"})
    assert check_generated(image, 1, "-bad-output") == [image]
