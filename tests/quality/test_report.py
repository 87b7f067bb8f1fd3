"""The report's files: marked failures, full-size images, and escaped text of others."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from mezzotint.cli import compare as compare_command
from mezzotint.generation.image_io import BACKGROUND_COLOR, LABEL, MARGIN, contact_sheet
from mezzotint.quality.compare import Comparison, compare
from mezzotint.quality.compare.command import command_line
from mezzotint.quality.report import album, html, markdown, tables, write_report
from mezzotint.quality.report.album import Album
from mezzotint.untrusted.escaping import markdown as foreign
from mezzotint.untrusted.escaping import printable
from support.modelopt_exporter import export
from support.pipeline_cases import Case

PROMPT = "a small green triangle on a yellow background"
HOSTILE = (
    "<img src=x onerror=alert(1)> \x1b[31mred\u202e](http://a.b) "
    "| `c` **d** www.e.f @g \udcff</script>"
)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """One prompt, one candidate, which fails at `strict`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("failed")
    (folder / "prompts.txt").write_text(f"{PROMPT}\n")
    options = {
        "prompts": str(folder / "prompts.txt"),
        "steps": 2,
        "device": "cpu",
        "gate": "strict",
    }
    return compare("demo", ["w4=demo-nvfp4"], folder / "report", **options)


def folder_of(comparison: Comparison) -> Path:
    return comparison.reference.folder.parents[1]


def named(comparison: Comparison, name: str) -> Comparison:
    """Return the comparison with another name of the candidate."""
    (judged,) = comparison.candidates
    run = replace(judged.run, candidate=replace(judged.run.candidate, name=name))
    prompts = (replace(comparison.settings.prompts[0], category=name),)
    settings = replace(comparison.settings, prompts=prompts)
    reasons = (f"{name} is wrong",)
    judged = replace(judged, run=run, reasons=reasons)
    return replace(
        comparison, settings=settings, candidates=(judged,), command=command_line([name])
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.text += data


def test_what_breaks_the_gate_is_marked(failed: Comparison) -> None:
    report = failed.to_dict()
    (candidate,) = report["candidates"]
    failing = tables.failing(candidate)
    assert {"latent_rmse_last", "psnr"} >= failing.keys() >= {"psnr"}
    assert failing["psnr"] == next(reason for reason in candidate["reasons"] if "PSNR" in reason)
    page = Page(html.render(failed, report, folder_of(failed)))
    bad = [
        entries["title"]
        for tag, entries in page.tags
        if tag == "td" and entries.get("class") == "bad"
    ]
    assert bad[: len(failing)] == [
        failing[name] for name in tables.shown_metrics(report) if name in failing
    ]
    assert f"**{candidate['metrics']['psnr']:.1f}**" in markdown.render(report)


def test_a_number_that_its_gate_allows_is_not_marked(failed: Comparison) -> None:
    report = failed.to_dict()
    (candidate,) = report["candidates"]
    kept = candidate | {"gate": candidate["gate"] | {"limits": []}}
    assert tables.failing(kept) == {}
    assert (
        tables.failing_alone(report, candidate, report["noise_floor"]["other_kernels"]["metrics"])
        == {}
    )
    assert "psnr" in tables.failing_alone(
        report, candidate, report["noise_floor"]["other_seed"]["metrics"]
    )
    assert tables.too_many_bits(candidate | {"gate": {"max_bits_per_weight": 1.0}})
    assert not tables.too_many_bits(report["reference"])


def test_images_are_in_the_page_byte_for_byte(failed: Comparison) -> None:
    page = html.render(failed, failed.to_dict(), folder_of(failed))
    request = next(iter(failed.settings.requests().values()))
    for run in (failed.reference, failed.candidates[0].run):
        (file,) = run.frame_files(request)
        assert album._uri("image/png", file.read_bytes()) in page


def test_images_over_the_budget_are_linked(
    failed: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "Album", lambda folder: Album(folder, budget=0))
    folder = folder_of(failed)
    page = Page(html.render(failed, failed.to_dict(), folder))
    images = [entries for tag, entries in page.tags if tag == "img"]
    assert len(images) == 3
    for entries in images:
        assert str(entries["src"]).startswith("data:image/jpeg;base64,")
        with Image.open(folder / str(entries["data-full"])) as image:
            assert image.size == (64, 64)
            assert image.format == "PNG"


def test_a_page_elsewhere_takes_the_files_with_it(failed: Comparison, tmp_path: Path) -> None:
    request = next(iter(failed.settings.requests().values()))
    (file,) = failed.reference.frame_files(request)
    media = Album(tmp_path, budget=0).image(file)
    assert (tmp_path / media.full).read_bytes() == file.read_bytes()
    assert not Path(media.full).is_absolute()


def test_a_video_has_players_a_strip_and_its_worst_frame(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases("wan_ti2v")
    exported = export(
        case.reference.transformer, case.largest["transformer"], "fp8", tmp_path / "fp8"
    )
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    options = {"prompts": str(tmp_path / "prompts.txt"), "steps": 1, "frames": 5, "device": "cpu"}
    size = {"height": 32, "width": 32}
    comparison = compare(
        str(case.folder),
        [str(exported)],
        tmp_path / "report",
        size=size,
        metrics=["flip"],
        **options,
    )
    write_report(comparison, tmp_path / "report")
    page = Page((tmp_path / "report/report.html").read_text())
    videos = [entries for tag, entries in page.tags if tag == "video"]
    assert len(videos) == 2
    assert all(str(entries["src"]).startswith("data:video/mp4;base64,") for entries in videos)
    assert len(list((tmp_path / "report/images").glob("*.mp4"))) == 2
    worst = comparison.candidates[0].scores[0].worst_frame
    assert f"frame {worst}, the worst" in page.text
    strip = [entries["data-full"] for tag, entries in page.tags if "data-full" in entries]
    assert len(strip) == 2 * 5
    assert all((tmp_path / "report" / str(path)).is_file() for path in strip)


def test_odd_sides_have_no_player(tmp_path: Path) -> None:
    assert Album(tmp_path).video([Image.new("RGB", (33, 32))], 8, "odd") is None


def test_the_page_shows_foreign_text_and_does_nothing_else_with_it(failed: Comparison) -> None:
    hostile = named(failed, HOSTILE)
    text = html.render(hostile, hostile.to_dict(), folder_of(failed))
    page, plain = Page(text), Page(html.render(failed, failed.to_dict(), folder_of(failed)))
    assert [tag for tag, _ in page.tags if tag in ("img", "script")] == [
        tag for tag, _ in plain.tags if tag in ("img", "script")
    ]
    assert not any(name.startswith("on") for _, entries in page.tags for name in entries)
    assert printable(HOSTILE) in page.text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)
    text.encode("utf-8")


def test_every_file_is_written_with_foreign_names(failed: Comparison, tmp_path: Path) -> None:
    files = write_report(named(failed, HOSTILE), tmp_path)
    assert [file.name for file in files] == ["report.html", "report.json", "report.md", "sheet.png"]
    assert json.loads(files[1].read_text())["candidates"][0]["name"] == HOSTILE
    lines = files[2].read_text().splitlines()
    assert "\x1b" not in "".join(lines)
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert bars <= {len(tables.COST_TITLES) + 2, len(tables.shown_metrics(failed.to_dict())) + 2}


def test_the_command_prints_foreign_names_and_does_nothing_else(
    failed: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    compare_command._print(named(failed, HOSTILE).to_dict())
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert printable(HOSTILE)[:20] in printed


MARKS = st.sampled_from("\\`*_{}[]()<>#+-.!|~$&@:/\n\r\x1b\u202e\u2028ab1 ")


@given(st.one_of(st.text(), st.text(MARKS)))
def test_markdown_has_no_mark_left_in_foreign_text(text: str) -> None:
    found = foreign(text)
    assert len(found.splitlines()) <= 1
    assert not re.search(r"[<>@]", found)
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]#|~$]", re.sub("&(?:#64|lt|gt|amp);", "", found))
    assert "://" not in found
    assert not re.match(r"\d*[-+.)=]", found)


def test_markdown_shows_what_was_meant() -> None:
    assert foreign("demo-fp8 (w4)") == "demo-fp8 (w4)"
    assert foreign("blocks.1.to_q | <b>") == r"blocks.1.to\_q \| &lt;b&gt;"
    assert foreign("see https://a.b, www.c.d and @e") == r"see https:\//a.b, www\.c.d and &#64;e"
    assert foreign("1. one\n- two") == r"1\. one\\x0a- two"


@given(st.text())
def test_visible_text_can_be_written_and_steers_nothing(text: str) -> None:
    found = printable(text)
    found.encode("utf-8")
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", found)
    assert printable(found) == found


def test_the_command_that_made_it_is_in_every_report(failed: Comparison) -> None:
    report = failed.to_dict()
    assert report["command"].startswith("mezzotint compare demo w4=demo-nvfp4 --output ")
    assert report["command"].endswith("--steps 2 --gate strict --device cpu")
    assert report["command"] in Page(html.render(failed, report, folder_of(failed))).text
    assert foreign(report["command"]) in markdown.render(report)


def test_a_command_line_is_quoted_and_leaves_out_what_was_not_given() -> None:
    options = {
        "prompts": None,
        "size": {"width": 64, "height": 32},
        "metrics": ["psnr", "flip"],
        "seeds": 2,
    }
    expected = "mezzotint compare a 'b c' --size 64x32 --metrics psnr,flip --seeds 2"
    assert command_line(["a", "b c"], **options) == expected
    assert command_line(["a"], size={"height": 32}) == "mezzotint compare a --size 32"


@pytest.mark.parametrize("name", ["word " * 60, "extraordinarily" * 20, "", "a b"])
def test_names_on_a_sheet_do_not_overlap(name: str) -> None:
    """A gap remains between columns and between names and images; letters overhang by a pixel."""
    side = 96
    black = Image.new("RGB", (side, side))
    found = np.asarray(contact_sheet([[black, black], [black, black]], [name, name], [name, name]))
    width, height = found.shape[1], found.shape[0]
    left = width - 2 * (side + MARGIN)
    assert left <= LABEL + 2 * MARGIN
    paper = np.array(BACKGROUND_COLOR)
    gaps = [
        found[:, left - MARGIN // 2 : left - 1],
        found[:, left + side + 1 : left + side + MARGIN - 1],
    ]
    rows = found[height - side - 2 * MARGIN : height - side - MARGIN, :]
    for gap in (*gaps, rows):
        assert (gap == paper).all()


def test_a_long_name_is_cut_with_dots() -> None:
    font = ImageFont.load_default(size=13)
    from mezzotint.generation.image_io import _wrap

    lines = _wrap("many words that go on " * 20, font, 100, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 100 for line in lines)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_terminal_of_any_encoding_gets_the_table(encoding: str) -> None:
    """`compare` prints arrows and dashes; run in a process whose streams have this encoding."""
    code = (
        "from mezzotint.cli.encoding import print_in_any_encoding as p; p();"
        "print('PSNR dB ↑ – ≥ 猫 \\udcff'); import sys; print('↓', file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, check=True
    )
    assert re.fullmatch(
        r"PSNR dB \^ - >= \\u732b \\udcff", done.stdout.decode(encoding).strip().replace("≥", ">=")
    )
    assert done.stderr.decode(encoding).strip() == "v"
