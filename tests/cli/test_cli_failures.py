"""A failed command prints one message or one JSON object, and exits with a code other than 1."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from mezzotint.cli import app, failures
from mezzotint.cli.output import Steps
from mezzotint.errors import BrokenFile, Unsupported
from support.cli_runner import run

COMMANDS = {
    "bench": ("bench", "flux1-dev"),
    "compare": ("compare", "demo", "demo-fp8", "-o", "report"),
    "convert": ("convert", "demo-fp8", "-o", "out"),
    "demo": ("demo",),
    "diagnose": ("diagnose", "demo", "demo-fp8"),
    "generate": ("generate", "a"),
    "inspect": ("inspect", "demo-fp8"),
    "verify": ("verify", "demo-fp8"),
    "warmup": ("warmup",),
}
ENTRIES = {
    "bench": "mezzotint.bench.published_model",
    "compare": "mezzotint.quality.compare.compare",
    "convert": "mezzotint.conversion.convert",
    "demo": "mezzotint.demo.run",
    "diagnose": "mezzotint.quality.diagnose.diagnose",
    "generate": "mezzotint.generation.pipeline.load_pipeline",
    "inspect": "mezzotint.checkpoint.inspect",
    "verify": "mezzotint.verification.verify",
    "warmup": "mezzotint.generation.pipeline.load_pipeline",
}
"""{command: the function of the API that it calls}. Tests make this function fail."""
FAILURES = {
    "ours": (
        BrokenFile("a.safetensors: is cut", "download it again."),
        2,
        "BrokenFile",
        "a.safetensors: is cut",
    ),
    "files": (
        OSError(errno.ENOSPC, "No space left on device", "a"),
        2,
        "OSError",
        "No space left on device",
    ),
    "python's memory": (MemoryError(), 4, "OutOfMemory", "out of memory: MemoryError"),
    "the GPU's memory": (
        torch.OutOfMemoryError("CUDA out of memory."),
        4,
        "OutOfMemory",
        "CUDA out of memory",
    ),
    "the CPU's memory": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: "
            "can't allocate memory: you tried to"
        ),
        4,
        "OutOfMemory",
        "can't allocate memory",
    ),
    "a fault": (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        4,
        "RuntimeError",
        "unexpected: mat1",
    ),
    "a silent fault": (KeyError(), 4, "KeyError", "unexpected: KeyError"),
}


def fails(monkeypatch: pytest.MonkeyPatch, command: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ENTRIES[command], fail)


def test_every_command_is_tried() -> None:
    assert set(COMMANDS) == set(get_command(app).commands)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_one_message_and_never_exit_code_1(
    command: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    error, code, _, said = FAILURES[kind]
    fails(monkeypatch, command, error)
    done = run(*COMMANDS[command], cwd=tmp_path)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.count("error:") == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"warmup"}))
@pytest.mark.parametrize("kind", FAILURES)
def test_with_json_a_failure_is_an_object_on_stdout(
    command: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    error, code, name, said = FAILURES[kind]
    fails(monkeypatch, command, error)
    done = run(*COMMANDS[command], "--json", cwd=tmp_path)
    assert done.returncode == code
    assert json.loads(done.stdout).keys() - {"path", "verdict"} == {"error"}
    found = json.loads(done.stdout)["error"]
    assert set(found) == {"type", "message", "hint"}
    assert found["type"] == name
    assert said in found["message"]
    assert "error:" not in done.stderr


def test_a_lack_of_memory_that_an_error_of_ours_names_is_one_too() -> None:
    error = Unsupported("out of memory while loading")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert failures.Failure.of(error).exit_code == failures.FAILED


def test_an_interrupt_is_neither_a_failed_gate_nor_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fails(monkeypatch, "inspect", KeyboardInterrupt())
    done = run("inspect", "demo-fp8")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_reader_that_has_gone_is_no_failed_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, "inspect", BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert run("inspect", "demo-fp8").returncode == 141


def test_a_fault_shows_where_it_is_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, "inspect", RuntimeError("odd"))
    monkeypatch.setenv(failures.TRACEBACK, "1")
    done = run("inspect", "demo-fp8")
    assert done.returncode == 4
    assert "Traceback" in done.stderr


def test_what_a_file_says_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(
        monkeypatch, "inspect", BrokenFile("\x1b[2J\x07 [/foo] \u202e a\udcff\r", "b\x1b]0;c\x07")
    )
    said = run("inspect", "demo-fp8").stderr
    assert not set(said) & {"\x1b", "\x07", "\u202e", "\r"}
    assert r"\x1b[2J\x07 [/foo] \u202e a\udcff\x0d" in said


def test_a_prompt_may_be_called_json() -> None:
    assert failures.wants_json(["generate", "--json"])
    assert not failures.wants_json(["generate", "--", "--json"])
    assert not failures.wants_json([])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples_that_are_of_its_command(command: str) -> None:
    text = get_command(app).commands[command].help or ""
    assert "Examples:" in text
    assert f"\n  mezzotint {command}" in text


def test_progress_is_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A line appears at once, and again at intervals, also while nothing is reported."""
    repeated = threading.Event()
    with Steps(interval=0.001) as progress:
        progress.say("demo [/b]\x1b", 3, 24)
        for _ in range(10_000):
            if capsys_has(capsys, "demo [/b]\\x1b, 3 of 24"):
                repeated.set()
                break
    assert repeated.is_set()


def capsys_has(capsys: pytest.CaptureFixture[str], text: str) -> bool:
    threading.Event().wait(0.001)
    return text in capsys.readouterr().err


def test_compare_says_how_far_it_is_without_a_terminal(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a large red circle on a blue background\n")
    command = (
        "compare",
        "demo",
        "demo-fp8",
        "--prompts",
        str(prompts),
        "--steps",
        "1",
        "-o",
        str(tmp_path / "r"),
    )
    done = run(*command, "--device", "cpu")
    assert done.returncode in (0, 1)
    assert "s: loading" in done.stderr.splitlines()[0]
    assert any(line.endswith(("of 4", "report")) for line in done.stderr.splitlines()[1:])


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mezzotint", "--version"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert (done.returncode, done.stdout) == (0, "mezzotint 0.1.0\n")
