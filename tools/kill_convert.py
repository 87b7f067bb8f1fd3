"""Kill a conversion at random moments, look at what is there, restart it, and compare the bytes.

Each trial forks a child that converts, kills it with SIGKILL after a random time, and checks that the output is absent,
old or complete; then a second run must redo at most one shard and end byte-identical, leaving nothing beside it.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mezzotint

SHARD_BYTES = 3 * 10**6


@dataclass
class Trial:
    """What was found after one kill."""

    seconds: float
    killed: bool
    state: str
    finished: int
    resumed: int


def digest(folder: Path) -> dict[str, str]:
    """{path inside the folder: SHA-256}"""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()
    }


def run(source: Path, output: Path, overwrite: bool) -> Any:
    return mezzotint.convert(source, output, shard_bytes=SHARD_BYTES, overwrite=overwrite)


def killed_after(seconds: float, source: Path, output: Path, overwrite: bool) -> bool:
    """Convert in a child that is killed after so many seconds; whether it was still running."""
    child = os.fork()
    if child == 0:
        run(source, output, overwrite)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def leftovers(output: Path) -> list[str]:
    return [path.name for path in output.parent.iterdir() if path.name.startswith(f".{output.name}.")]


def finished_shards(output: Path) -> int:
    """How many shards the journal of the interrupted run names."""
    journals = list(output.parent.glob(f".{output.name}.partial-*.journal"))
    return sum(len(journal.read_text().splitlines()) for journal in journals)


def trial(source: Path, output: Path, expected: dict[str, str], seconds: float, old: Path | None) -> Trial:
    """One kill and one restart, beside an old output or none."""
    if old is not None:
        shutil.copytree(old, output)
    killed = killed_after(seconds, source, output, overwrite=old is not None)
    state = look(output, expected, old)
    finished = finished_shards(output)
    resumed = 0
    if state != "complete":
        report = run(source, output, overwrite=old is not None)
        resumed = len(report.resumed)
        assert resumed >= finished, f"{finished} shards were finished and {resumed} were kept"
    else:
        run(source, output, overwrite=True)
    assert digest(output) == expected, "the restart ended with other bytes"
    assert not leftovers(output), f"left behind: {leftovers(output)}"
    shutil.rmtree(output)
    return Trial(seconds, killed, state, finished, resumed)


def look(output: Path, expected: dict[str, str], old: Path | None) -> str:
    """absent, old or complete; anything else is a failure."""
    if not output.exists():
        assert old is None, "the old output is gone"
        return "absent"
    found = digest(output)
    if found == expected:
        return "complete"
    assert old is not None, "the output is there and not complete"
    assert found == digest(old), "the old output has changed"
    return "old"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path, help="where to work; must not exist")
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has none of the threads that its parent started
    arguments.folder.mkdir(parents=True)
    output, old = arguments.folder / "out", arguments.folder / "old"
    run(arguments.source, output, overwrite=False)
    started = time.monotonic()
    run(arguments.source, output, overwrite=True)
    whole = time.monotonic() - started
    expected = digest(output)
    shutil.rmtree(output)
    old.mkdir()
    (old / "note.txt").write_text("what was there before\n")
    random.seed(arguments.seed)
    trials = []
    for i in range(arguments.points):
        seconds = random.uniform(0, whole * 1.2)
        trials.append(trial(arguments.source, output, expected, seconds, old if i % 2 else None))
        print(trials[-1], file=sys.stderr)
    states = {state: sum(t.state == state for t in trials) for state in ("absent", "old", "complete")}
    summary = {"points": len(trials), "killed": sum(t.killed for t in trials), **states}
    print(json.dumps(summary | {"resumed": sum(t.resumed > 0 for t in trials), "whole_run_s": round(whole, 3)}))


if __name__ == "__main__":
    main()
