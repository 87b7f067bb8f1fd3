"""Scripts in examples/ and Python blocks of the README run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTPUTS = {"generate": "circle.png", "convert": "demo.safetensors", "inspect_checkpoint": ""}


def run(code: list[str], folder: Path) -> None:
    done = subprocess.run([sys.executable, *code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda f: f.stem)
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    output = OUTPUTS[script.stem]
    run([str(script), *([output] if output else [])], tmp_path)
    assert not output or (tmp_path / output).stat().st_size > 0


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    run(["-c", "\n".join(blocks)], tmp_path)
    assert (tmp_path / "circle.png").exists()
    assert (tmp_path / "saved/model_index.json").exists()
