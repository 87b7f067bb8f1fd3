"""Scripts in examples/ and Python blocks of the README run."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTPUTS = {"generate": "circle.png", "convert": "demo.safetensors", "inspect_checkpoint": ""}


@pytest.fixture(autouse=True)
def _work_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(script: Path, *arguments: str) -> None:
    """Run a script in this process, which has imported PyTorch and diffusers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda f: f.stem)
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    output = OUTPUTS[script.stem]
    run(script, *([output] if output else []))
    assert not output or (tmp_path / output).stat().st_size > 0


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    run(script)
    assert (tmp_path / "circle.png").exists()
    assert (tmp_path / "saved/model_index.json").exists()
