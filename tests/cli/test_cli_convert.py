"""`mezzotint convert` and `mezzotint verify`, run as a user runs them."""

import json
from pathlib import Path

import pytest
import torch

from support.checkpoint_edits import rewrite
from support.cli_runner import run


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_both_commands_have_examples(command: str) -> None:
    assert f"mezzotint {command}" in run(command, "--help").stdout


def test_convert_says_what_it_did(tmp_path: Path) -> None:
    done = run("convert", "demo-nvfp4", "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "modelopt to mezzotint" in done.stdout
    assert "lossless" in done.stdout
    done = run("convert", "demo-nvfp4", "-o", str(tmp_path / "b"), "--to", "bf16", "--json")
    report = json.loads(done.stdout)
    assert report["target"] == "bf16"
    assert list(report["transforms"]) == ["decoded to BF16"]


def test_a_converted_transformer_generates_the_same_image(tmp_path: Path) -> None:
    run("convert", "demo-nvfp4", "-o", str(tmp_path / "out"))
    images = []
    for transformer in ("demo-nvfp4", str(tmp_path / "out")):
        file = tmp_path / f"{len(images)}.png"
        run(
            "generate",
            "a red star",
            "--steps",
            "1",
            "--transformer",
            transformer,
            "-o",
            str(file),
            "--device",
            "cpu",
        )
        images.append(file.read_bytes().split(b"IDAT", 1)[1])
    assert images[0] == images[1]


def test_a_refusal_exits_with_2_and_writes_nothing(tmp_path: Path) -> None:
    done = run("convert", "demo-fp8", "-o", str(tmp_path / "x"), "--keep-bf16", "nothing")
    assert done.returncode == 2
    assert "hint:" in done.stderr
    assert not list(tmp_path.iterdir())


def test_verify_exits_with_what_it_found(nvfp4: Path) -> None:
    assert run("verify", str(nvfp4)).returncode == 0
    key = "transformer_blocks.0.attn.to_q"
    rewrite(nvfp4, lambda tensors: tensors[f"{key}.weight"].zero_())
    done = run("verify", str(nvfp4), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["verdict"] == "suspicious"
    rewrite(
        nvfp4, lambda tensors: tensors.update({f"{key}.input_scale": torch.tensor(float("nan"))})
    )
    done = run("verify", str(nvfp4))
    assert done.returncode == 2
    assert done.stdout.strip().endswith("broken")
