"""The built-in model: quantized copies are rebuilt once, byte for byte, or refused."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mezzotint_demo
from mezzotint import builtin
from mezzotint.builtin import QUANTIZED, copies, is_demo, resolve
from mezzotint.errors import BrokenFile, CannotWrite, NotACheckpoint

BASE = mezzotint_demo.PIPELINE / "transformer"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights_of(copy: Path) -> Path:
    return copy / copies.WEIGHTS if copy.is_dir() else copy


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_copy_is_written_once_with_the_original_bytes(name: str, cache: Path) -> None:
    file = weights_of(resolve(name))
    written = file.stat().st_mtime_ns
    recipe = copies.CopyRecipe.read(mezzotint_demo.COPIES / f"{name}.safetensors")
    assert file.is_relative_to(cache)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == recipe.sha256
    assert weights_of(resolve(name)).stat().st_mtime_ns == written


def test_two_processes_write_one_copy(cache: Path) -> None:
    code = "from mezzotint.builtin import resolve; print(resolve('demo-fp8'))"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    shown = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    (copy,) = shown
    assert sorted(file.name for file in Path(copy).iterdir()) == ["config.json", copies.WEIGHTS]


def test_changed_weights_are_refused(cache: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    with (base / copies.WEIGHTS).open("r+b") as stream:
        stream.seek(-2, 2)
        stream.write(b"\x00\x40")
    with pytest.raises(BrokenFile, match="differs from the original"):
        copies.cached_copy(mezzotint_demo.COPIES / "demo-fp8.safetensors", base)
    assert not list(cache.rglob("*.safetensors"))


def test_a_cache_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CannotWrite, match="could not be written"):
        resolve("demo-nvfp4")


def test_without_its_package_the_built_in_model_is_named_as_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mezzotint_demo", None)
    monkeypatch.setattr(builtin, "find_spec", lambda _name: None)
    with pytest.raises(NotACheckpoint, match="not installed"):
        resolve("demo")
    assert not is_demo(BASE.parent)
