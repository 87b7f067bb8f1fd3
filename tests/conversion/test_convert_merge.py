"""`convert --merge-into` plans the merged pipeline as `load` does, and shares no files with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mezzotint
from mezzotint import hub
from mezzotint.errors import BadRequest, MezzotintError, MissingTensor, ShapeMismatch, UnknownFormat
from mezzotint.generation.source import PipelineSource
from mezzotint.saving import copies
from support.checkpoint_edits import WEIGHTS, rewrite
from support.digest import digest
from support.merge_pipelines import pipeline_around
from support.pipeline_cases import Case


@pytest.fixture
def pipeline(nvfp4: Path, tmp_path: Path) -> Path:
    """A pipeline folder of FLUX.1; the export stays where it is, too."""
    return pipeline_around(Path(shutil.copytree(nvfp4, tmp_path / "copy")), tmp_path / "pipe")


def single_file(source: Path, file: Path) -> Path:
    """The weights of a component as one file without a configuration."""
    save_file(load_file(source / WEIGHTS), file, {"format": "pt"})
    return file


@pytest.mark.parametrize("name", ["zimage", "flux1", "qwenimage", "wan_a14b"])
def test_a_file_without_a_configuration_keeps_the_pipelines_own(
    cases: Callable[[str], Case], tmp_path: Path, name: str
) -> None:
    folder = cases(name).folder
    source = single_file(folder / "transformer", tmp_path / "weights.safetensors")
    mezzotint.convert(source, tmp_path / "out", merge_into=folder)
    original = json.loads((folder / "transformer/config.json").read_text())
    written = json.loads((tmp_path / "out/transformer/config.json").read_text())
    assert original.items() <= written.items()
    assert set(PipelineSource.open(tmp_path / "out").plan()) >= {"transformer"}
    files = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
    assert {
        file.relative_to(tmp_path / "out")
        for file in (tmp_path / "out").rglob("*")
        if file.is_file()
    } >= files


def test_the_second_expert_of_a_pipeline_is_replaced_by_a_single_file(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    folder = cases("wan_a14b").folder
    source = single_file(folder / "transformer_2", tmp_path / "weights.safetensors")
    mezzotint.convert(source, tmp_path / "out", component="transformer_2", merge_into=folder)
    assert set(PipelineSource.open(tmp_path / "out").plan()) == {
        "transformer",
        "transformer_2",
    }


def test_another_family_is_refused_before_a_byte_is_written(
    cases: Callable[[str], Case], nvfp4: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UnknownFormat, match=r"is a FLUX\.1 transformer .* and the transformer of .* is a ZImage"
    ):
        mezzotint.convert(nvfp4, tmp_path / "out", merge_into=cases("zimage").folder)
    assert [path.name for path in tmp_path.iterdir()] == ["nvfp4"]


def test_another_size_is_refused_before_a_byte_is_written(
    cases: Callable[[str], Case], nvfp4: Path, tmp_path: Path
) -> None:
    with pytest.raises((ShapeMismatch, MissingTensor, MezzotintError)):
        mezzotint.convert(nvfp4, tmp_path / "out", merge_into=cases("flux1").folder)
    assert [path.name for path in tmp_path.iterdir()] == ["nvfp4"]


def test_a_layer_kept_from_a_base_of_another_size_is_refused(
    nvfp4: Path, data: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(data / "base/flux1", tmp_path / "base"))
    layer = "single_transformer_blocks.0.proj_out"
    rewrite(
        base,
        lambda tensors: tensors.update(
            {f"{layer}.weight": torch.zeros(8, 8, dtype=torch.bfloat16)}
        ),
    )
    with pytest.raises(ShapeMismatch, match=r"proj_out\.weight"):
        mezzotint.convert(nvfp4, tmp_path / "out", keep_bf16=[layer], base=base)


INDICES = {
    "no JSON": ("{", MezzotintError),
    "a list": ("[]", MezzotintError),
    "no such class": (
        '{"_class_name": "Nothing", "transformer": ["diffusers", "X"]}',
        MezzotintError,
    ),
    "a module": ('{"_class_name": "utils", "transformer": ["diffusers", "X"]}', MezzotintError),
    "no transformer": ('{"_class_name": "FluxPipeline"}', MezzotintError),
    "a name outside": (
        '{"_class_name": "FluxPipeline", "../x": ["diffusers", "X"]}',
        MezzotintError,
    ),
    "a component that is not there": (
        '{"_class_name": "FluxPipeline", '
        '"transformer": ["diffusers", "FluxTransformer2DModel"], "te": ["a", "B"]}',
        MezzotintError,
    ),
}


@pytest.mark.parametrize("case", INDICES)
def test_a_pipeline_that_cannot_be_loaded_is_refused(
    nvfp4: Path, pipeline: Path, tmp_path: Path, case: str
) -> None:
    text, error = INDICES[case]
    (pipeline / "model_index.json").write_text(text)
    with pytest.raises(error):
        mezzotint.convert(nvfp4, tmp_path / "out", merge_into=pipeline)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("component", ["../nvfp4", "vae", "nothing", "."])
def test_only_a_component_that_the_pipeline_has_is_replaced(
    nvfp4: Path, pipeline: Path, tmp_path: Path, component: str
) -> None:
    with pytest.raises((BadRequest, UnknownFormat)):
        mezzotint.convert(nvfp4, tmp_path / "out", component=component, merge_into=pipeline)
    assert not (tmp_path / "out").exists()


def test_to_change_the_output_does_not_change_the_pipeline(
    nvfp4: Path, pipeline: Path, tmp_path: Path
) -> None:
    before = digest(pipeline)
    mezzotint.convert(nvfp4, tmp_path / "out", merge_into=pipeline)
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert file.stat().st_nlink == 1
            with file.open("r+b") as stream:
                stream.write(b"edited")
    assert digest(pipeline) == before


def test_links_of_a_pipeline_are_followed_and_other_weights_left_out(
    nvfp4: Path, pipeline: Path, tmp_path: Path
) -> None:
    (pipeline / "scheduler").rename(pipeline / "shared")
    (pipeline / "scheduler").symlink_to(pipeline / "shared")
    (pipeline / "flux1-dev.safetensors").write_text("24 GB")
    (pipeline / "README.md").write_text("read me")
    (pipeline / "photos").mkdir()
    (pipeline / "photos/a.jpg").write_text("a")
    report = mezzotint.convert(nvfp4, tmp_path / "out", merge_into=pipeline)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "model_index.json", "scheduler", "transformer"]
    assert (tmp_path / "out/scheduler/scheduler_config.json").is_file()
    assert not (tmp_path / "out/scheduler").is_symlink()
    assert any("flux1-dev.safetensors, photos" in note for note in report.notes)


def test_files_are_cloned_where_the_disk_can(
    nvfp4: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloned = []

    def clone(source: Path, target: Path) -> bool:
        cloned.append(source.name)
        shutil.copyfile(source, target)
        return True

    monkeypatch.setattr("mezzotint.saving.output.clone_file", clone)
    monkeypatch.setattr("mezzotint.saving.output.copy_bytes", lambda *_: pytest.fail("copied"))
    mezzotint.convert(nvfp4, tmp_path / "out", merge_into=pipeline)
    assert sorted(cloned) == ["model_index.json", "scheduler_config.json"]


def test_a_disk_without_clones_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    if not copies.clone_file(tmp_path / "a", tmp_path / "b"):
        assert not (tmp_path / "b").exists()
        copies.copy_bytes(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "x"


def test_a_pipeline_on_the_hub(
    nvfp4: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Second copies of weights, and weights of the component that is replaced, are not fetched."""
    for name in (
        "transformer/more.safetensors",
        "scheduler/model.fp16.safetensors",
        "scheduler/a.bin",
        "scheduler/m.safetensors",
    ):
        (pipeline / name).write_text("x")
    files = {
        file.relative_to(pipeline).as_posix(): 1 for file in pipeline.rglob("*") if file.is_file()
    }
    fetched = []

    def fetch(path: hub.HubPath) -> Path:
        fetched.append(str(path.path))
        return pipeline / path.path

    monkeypatch.setattr(hub.HubPath, "fetch", fetch)
    monkeypatch.setattr(
        hub.HubPath, "stat", lambda path: hub.FileStat((pipeline / path.path).stat().st_size)
    )
    repo = hub.Repo("owner/pipe", "main", "c0ffee", files)
    monkeypatch.setattr(
        "mezzotint.builtin.hub_path",
        lambda name: hub.HubPath(repo) if name == "owner/pipe" else None,
    )
    mezzotint.convert(nvfp4, tmp_path / "out", merge_into="owner/pipe")
    assert set(fetched) == {
        "model_index.json",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
        "scheduler/m.safetensors",
    }
    assert (tmp_path / "out/scheduler/m.safetensors").read_text() == "x"
    PipelineSource.open(tmp_path / "out").plan()
