"""The commands, run as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.markup import render
from typer.main import get_command

from mezzotint import demo
from mezzotint.cli import app
from support.checkpoint_edits import WEIGHTS, rewrite
from support.cli_runner import run

PROMPT = "a small green triangle on a yellow background"


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as opened:
        return opened.size


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['mezzotint', '--help']\n"
        "from mezzotint.cli import app\n"
        "try: app()\n"
        "finally: assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("generate", "inspect", "demo"))


@pytest.mark.parametrize("command", ["generate", "inspect", "compare", "diagnose", "demo"])
def test_every_command_has_examples(command: str) -> None:
    assert f"mezzotint {command}" in run(command, "--help").stdout


def test_generate_is_deterministic_and_writes_its_parameters(tmp_path: Path) -> None:
    names = ("one.png", "two.png")
    for name in names:
        done = run(
            "generate",
            PROMPT,
            "--transformer",
            "demo-nvfp4",
            "--steps",
            "3",
            "--seed",
            "5",
            "-o",
            name,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{name}\n"
    with Image.open(tmp_path / names[0]) as first, Image.open(tmp_path / names[1]) as second:
        assert first.tobytes() == second.tobytes()
        text = dict(first.info)
    parameters = json.loads(text["mezzotint"])
    assert parameters["prompt"] == PROMPT
    assert parameters["seed"] == 5
    assert parameters["steps"] == 3
    assert "Steps: 3" in text["parameters"]


def test_generate_makes_one_sheet_of_several_prompts(tmp_path: Path) -> None:
    prompts = (PROMPT, "a large red circle on a blue background")
    done = run(
        "generate",
        *prompts,
        "--count",
        "2",
        "--grid",
        "--steps",
        "1",
        "-o",
        "g.png",
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["files"] == ["g.png"]
    assert report["seeds"] == [0, 1, 2, 3]
    width, height = size_of(tmp_path / "g.png")
    assert width > 2 * 64
    assert height > 2 * 64


def test_generate_numbers_several_images(tmp_path: Path) -> None:
    assert (
        run(
            "generate", PROMPT, "--count", "2", "--steps", "1", "-o", "p.png", cwd=tmp_path
        ).returncode
        == 0
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p-1.png", "p-2.png"]


@pytest.mark.parametrize("damage", ["scale", "truncate", "nowhere"])
def test_a_damaged_checkpoint_ends_with_one_clear_error(
    nvfp4: Path, tmp_path: Path, damage: str
) -> None:
    named = "single_transformer_blocks.0.proj_mlp.weight_scale"
    if damage == "scale":
        rewrite(nvfp4, lambda tensors: tensors.pop(named))
    elif damage == "truncate":
        named = WEIGHTS
        (nvfp4 / WEIGHTS).write_bytes((nvfp4 / WEIGHTS).read_bytes()[:-1000])
    else:
        nvfp4 = named = tmp_path / "nowhere"
    done = run("generate", PROMPT, "--transformer", str(nvfp4), "-o", "out.png", cwd=tmp_path)
    assert done.returncode == 2
    assert str(named) in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.png"))


def test_inspect_says_what_a_checkpoint_is(nvfp4: Path) -> None:
    report = json.loads(run("inspect", str(nvfp4), "--json").stdout)
    assert report["format"] == "NVIDIA ModelOpt HF export"
    assert report["family"] == "FLUX.1"
    assert len(report["layers"]) == 20
    text = run("inspect", str(nvfp4), "--layers").stdout
    assert "codes low first, scales row major" in text
    assert "transformer_blocks.0.attn.to_q" in text


def test_inspect_lists_what_is_missing_and_exits_with_2(nvfp4: Path) -> None:
    key = "transformer_blocks.0.attn.to_q.weight_scale"
    rewrite(nvfp4, lambda tensors: tensors.pop(key))
    done = run("inspect", str(nvfp4), "--json")
    assert done.returncode == 2
    assert key in json.loads(done.stdout)["problems"][0]


def test_inspect_of_nothing_exits_with_2(tmp_path: Path) -> None:
    assert run("inspect", str(tmp_path)).returncode == 2


@pytest.mark.parametrize("name", ["demo-fp8", "demo-nvfp4", "demo-nvfp4-comfy"])
def test_inspect_knows_the_built_in_copies(name: str) -> None:
    report = json.loads(run("inspect", name, "--json").stdout)
    assert report["problems"] == []
    assert report["family"] == "FLUX.1"


def test_demo_agrees_with_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the six prompts; test_documented_prompts.py checks that all are captions."""
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:2])
    done = run("demo", "-o", "sheet.png", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "sheet.json").read_text())["rows"]}
    assert list(rows) == ["bf16", "fp8", "nvfp4"]
    assert rows["bf16"]["latent_cosine"] == pytest.approx(1)
    assert rows["fp8"]["latent_cosine"] >= 0.999
    assert rows["nvfp4"]["latent_cosine"] >= 0.98
    assert rows["nvfp4"]["weights_mib"] < rows["fp8"]["weights_mib"] < rows["bf16"]["weights_mib"]
    assert size_of(tmp_path / "sheet.png")[0] > 2 * 64


@pytest.mark.parametrize(
    "command", get_command(app).commands.values(), ids=lambda command: command.name
)
def test_help_prints_what_stands_in_brackets(command: Any) -> None:
    """Rich reads [words] as markup and prints nothing, unless the bracket is escaped."""
    for text in (parameter.help for parameter in command.params if parameter.help):
        assert render(text).plain == text.replace("\\[", "[")
