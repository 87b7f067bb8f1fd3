"""Measurements: one JSON line per run in benchmarks/results, with its commit and machine."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"


def append(name: str, what: str, figures: dict[str, Any]) -> None:
    """Add a row to `name`.jsonl, and print it."""
    row = {"what": what, "commit": COMMIT, "machine": machine(), "command": command(), **figures}
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))


def command() -> str:
    """Return the command line of this program."""
    return " ".join([str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])


def commit() -> str:
    """The commit, with "+" behind it where tracked source files differ from it."""
    revision = _git("rev-parse", "--short", "HEAD")
    return revision + (
        "+" if _git("status", "--porcelain", "--untracked-files=no", "--", "src", "tests") else ""
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor()
    )
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


COMMIT = commit()
"""The commit when the program started, in case a commit is made during a long measurement."""
