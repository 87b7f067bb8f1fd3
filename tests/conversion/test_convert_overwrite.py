"""`convert --overwrite` replaces only earlier outputs; a source must not change meanwhile."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import mezzotint
from mezzotint.errors import BadRequest, BrokenFile
from support.checkpoint_edits import WEIGHTS, rewrite
from support.digest import digest
from support.merge_pipelines import LAYER, pipeline_around

FORBIDDEN = {
    "the folder around the source": lambda root: (root / "models/src", root / "models", {}),
    "the source": lambda root: (root / "models/src", root / "models/src", {}),
    "the source's file": lambda root: (
        root / "models/src" / WEIGHTS,
        root / "models/src" / WEIGHTS,
        {"to": "comfy"},
    ),
    "the folder around a source that is a file": lambda root: (
        root / "models/src" / WEIGHTS,
        root / "models",
        {},
    ),
    "a folder in the source": lambda root: (
        root / "models",
        root / "models/note",
        {"component": "src"},
    ),
    "the base": lambda root: (root / "models/src", root / "base", {"base": root / "base"}),
    "the folder around the base": lambda root: (root / "models/src", root, {"base": root / "base"}),
    "the pipeline": lambda root: (
        root / "models/src",
        root / "pipe",
        {"merge_into": root / "pipe"},
    ),
    "a folder of the pipeline": lambda root: (
        root / "models/src",
        root / "pipe/scheduler",
        {"merge_into": root / "pipe"},
    ),
    "the scales": lambda root: (root / "models/src", root / "base", {"scales_from": root / "base"}),
    "the working folder": lambda root: (root / "models/src", Path(), {}),
    "the folder around the working folder": lambda root: (root / "models/src", Path(".."), {}),
    "by dots": lambda root: (root / "models/src", root / "models/src/..", {}),
    "a root": lambda root: (root / "models/src", Path("/"), {}),
    "a home": lambda root: (root / "models/src", root / "home", {}),
    "by a link": lambda root: (root / "models/src", root / "link/src", {}),
    "what is no output": lambda root: (root / "models/src", root / "plain", {}),
    "an empty component": lambda root: (root / "models/src", root / "base", {}),
}


@pytest.fixture
def field(nvfp4: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a source, a base, a pipeline, a home, notes and a working folder."""
    root = tmp_path / "root"
    for folder in ("models/note", "home", "plain", "work/here"):
        (root / folder).mkdir(parents=True)
    for note in ("models/note/a.txt", "models/mine.txt", "plain/thesis.txt", "work/here/a.txt"):
        (root / note).write_text("mine")
    shutil.copytree(nvfp4, root / "models/src")
    shutil.copytree(data / "base/flux1", root / "base")
    pipeline_around(nvfp4, root / "pipe")
    (root / "link").symlink_to(root / "models")
    monkeypatch.chdir(root / "work/here")
    monkeypatch.setenv("HOME", str(root / "home"))
    return root


@pytest.mark.parametrize("place", FORBIDDEN)
def test_overwrite_refuses_whatever_is_no_earlier_output(field: Path, place: str) -> None:
    make: Callable[[Path], tuple[Path, Path, dict[str, object]]] = FORBIDDEN[place]
    source, output, options = make(field)
    before = digest(field)
    with pytest.raises(BadRequest):
        mezzotint.convert(source, output, overwrite=True, **options)
    assert digest(field) == before


@pytest.mark.parametrize(
    "stranger", ["thesis.txt", ".notes", "deep/er/a.safetensors", "model.safetensors", "empty/"]
)
def test_a_stranger_in_an_earlier_output_is_named_and_stays(
    nvfp4: Path, tmp_path: Path, stranger: str
) -> None:
    output = tmp_path / "out"
    mezzotint.convert(nvfp4, output)
    place = output / stranger
    (place if stranger.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
    if not stranger.endswith("/"):
        place.write_text("mine")
    before = digest(output)
    with pytest.raises(BadRequest, match=f"convert did not write: {stranger}"):
        mezzotint.convert(nvfp4, output, overwrite=True)
    assert digest(output) == before
    assert place.exists()


def test_a_long_list_of_foreign_files_is_cut(nvfp4: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for i in range(100):
        (tmp_path / f"out/{i:03}").write_text("x")
    with pytest.raises(BadRequest, match=r"convert did not write: 000, 001, .*, 007 and 92 more"):
        mezzotint.convert(nvfp4, tmp_path / "out", overwrite=True)


def test_a_link_in_an_earlier_output_is_a_stranger_and_what_it_names_stays(
    nvfp4: Path, tmp_path: Path
) -> None:
    mezzotint.convert(nvfp4, tmp_path / "out")
    (tmp_path / "precious").mkdir()
    (tmp_path / "out/link").symlink_to(tmp_path / "precious")
    with pytest.raises(BadRequest, match="convert did not write: link"):
        mezzotint.convert(nvfp4, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("content", [b"", b"mine", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_convert_did_not_write_is_not_replaced(
    nvfp4: Path, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "out.safetensors"
    file.write_bytes(content)
    with pytest.raises(BadRequest, match=r"convert did not write: .*out\.safetensors"):
        mezzotint.convert(nvfp4, file, to="comfy", overwrite=True)
    assert file.read_bytes() == content


def test_earlier_outputs_of_every_kind_are_replaced(nvfp4: Path, tmp_path: Path) -> None:
    pipeline = pipeline_around(Path(shutil.copytree(nvfp4, tmp_path / "copy")), tmp_path / "pipe")
    outputs = {
        "file.safetensors": {"to": "comfy"},
        "folder": {"to": "modelopt", "shard_bytes": 300_000},
        "pipeline": {"merge_into": pipeline},
    }
    for name, options in outputs.items():
        mezzotint.convert(nvfp4, tmp_path / name, **options)
        mezzotint.convert(
            nvfp4, tmp_path / name, overwrite=True, **options | {"shard_bytes": 10**9}
        )
    assert not list(tmp_path.glob("folder/*.index.json")), "the old shards are gone"
    assert not list(tmp_path.glob(".*"))


def test_what_comes_to_the_output_meanwhile_is_not_lost(nvfp4: Path, tmp_path: Path) -> None:
    mezzotint.convert(nvfp4, tmp_path / "out")
    with pytest.raises(BadRequest, match=r"convert did not write: thesis\.txt"):
        mezzotint.convert(
            nvfp4,
            tmp_path / "out",
            shard_bytes=300_000,
            overwrite=True,
            on_progress=lambda _done, _all: (tmp_path / "out/thesis.txt").write_text("mine"),
        )
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"


def written_in_place(file: Path) -> None:
    """Other bytes under the same name, size and modification time."""
    stat = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\1\2\3\4")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replaced(file: Path) -> None:
    """Another file of the same bytes' number under the name, as a download that ends makes it."""
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    other.replace(file)


CHANGES = {
    "written in place": written_in_place,
    "replaced": replaced,
    "removed": Path.unlink,
    "cut off": lambda file: os.truncate(file, file.stat().st_size - 1),
    "replaced and put back": lambda file: (
        file.rename(file.with_name("a")),
        file.with_name("a").rename(file),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("old", [False, True])
def test_a_source_that_changes_while_it_is_read_is_an_error(
    nvfp4: Path, tmp_path: Path, change: str, old: bool
) -> None:
    output, seen = tmp_path / "out", []
    if old:
        mezzotint.convert(nvfp4, output, to="bf16")
    before = digest(output)

    def on_progress(done: int, total: int) -> None:
        if not seen and done > total / 2:
            seen.append(CHANGES[change](nvfp4 / WEIGHTS))

    with pytest.raises(BrokenFile, match=rf"{WEIGHTS}: .* while it was read"):
        mezzotint.convert(
            nvfp4, output, shard_bytes=200_000, overwrite=old, on_progress=on_progress
        )
    assert digest(output) == before
    assert not list(tmp_path.glob(".*")), "nothing that was mixed is kept for a later run"


@pytest.mark.parametrize("name", ["config.json", "base", "scales", "pipeline"])
def test_everything_that_is_read_must_stay(
    nvfp4: Path, data: Path, tmp_path: Path, name: str
) -> None:
    base = Path(shutil.copytree(data / "base/flux1", tmp_path / "base"))
    scales = Path(shutil.copytree(nvfp4, tmp_path / "scales"))
    pipeline = pipeline_around(Path(shutil.copytree(nvfp4, tmp_path / "copy")), tmp_path / "pipe")
    rewrite(nvfp4, lambda tensors: tensors.pop(f"{LAYER}.input_scale"))
    changing = {
        "config.json": nvfp4 / name,
        "base": base / WEIGHTS,
        "scales": scales / WEIGHTS,
        "pipeline": pipeline / "scheduler/scheduler_config.json",
    }[name]
    with pytest.raises(
        BrokenFile, match=f"{changing.name}: was replaced or removed while it was read"
    ):
        mezzotint.convert(
            nvfp4,
            tmp_path / "out",
            base=base,
            scales_from=scales,
            merge_into=pipeline,
            on_progress=lambda _done, _all: replaced(changing),
        )
    assert not (tmp_path / "out").exists()


def test_a_file_of_ours_says_so(nvfp4: Path, tmp_path: Path) -> None:
    mezzotint.convert(nvfp4, tmp_path / "out.safetensors", to="comfy")
    header = mezzotint.open(tmp_path / "out.safetensors").header
    assert "mezzotint_version" in header.metadata
    mezzotint.convert(nvfp4, tmp_path / "out")
    assert "mezzotint_version" in json.loads((tmp_path / "out/mezzotint.json").read_text())
