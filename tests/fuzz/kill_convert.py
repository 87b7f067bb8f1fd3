"""Kill a conversion at random moments, check the output, restart it, and compare the bytes.

Each trial kills a child process that converts after a random time. The output must be absent, old
or complete. A second run must redo at most one shard, write identical bytes, and leave no other
files.
"""

import argparse
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
from support import results_log
from support.digest import digest

SHARD_BYTES = 3 * 10**6


@dataclass
class Trial:
    """The state after one kill."""

    seconds: float
    killed: bool
    state: str
    redone: int
    resumed: int


def run(source: Path, output: Path, overwrite: bool) -> Any:
    return mezzotint.convert(source, output, shard_bytes=SHARD_BYTES, overwrite=overwrite)


def killed_after(seconds: float, source: Path, output: Path, overwrite: bool) -> bool:
    """Convert in a child that is killed after so many seconds; whether it was still running."""
    child = os.fork()
    if child == 0:
        try:
            run(source, output, overwrite)
        finally:
            os._exit(0)  # also after an error, or the child would go on as its parent does
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def leftovers(output: Path) -> list[str]:
    return [
        path.name for path in output.parent.iterdir() if path.name.startswith(f".{output.name}.")
    ]


def begun_shards(output: Path) -> int:
    """Return how many shards, complete or not, the killed run has written."""
    return len(list(output.parent.glob(f".{output.name}.partial-*/*.safetensors")))


def trial(
    source: Path, output: Path, expected: dict[str, str], seconds: float, old: Path | None
) -> Trial:
    """One kill and one restart, beside an old output or none."""
    if old is not None:
        shutil.copytree(old, output)
    killed = killed_after(seconds, source, output, overwrite=old is not None)
    state = look(output, expected, old)
    begun = 0 if state == "complete" else begun_shards(output)
    resumed = len(run(source, output, overwrite=output.exists()).resumed)
    redone = begun - resumed
    assert redone <= 1, f"{begun} shards were begun and only {resumed} were kept"
    assert digest(output) == expected, "the restart ended with other bytes"
    assert not leftovers(output), f"files left: {leftovers(output)}"
    shutil.rmtree(output)
    return Trial(seconds, killed, state, redone, resumed)


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


def measure(source: Path, folder: Path, points: int, seed: int) -> dict[str, Any]:
    """Kill conversions of `source` until `points` were killed; return what was found.

    folder   where to work; must not exist
    """
    folder.mkdir(parents=True)
    output, old = folder / "out", folder / "old"
    run(source, output, overwrite=False)
    started = time.monotonic()
    run(source, output, overwrite=True)
    whole = time.monotonic() - started
    expected = digest(output)
    shutil.rmtree(output)
    mezzotint.convert(source, old, shard_bytes=2 * SHARD_BYTES)
    chance = random.Random(seed)
    trials: list[Trial] = []
    while sum(trial.killed for trial in trials) < points:
        seconds = chance.uniform(0, whole)
        trials.append(trial(source, output, expected, seconds, old if len(trials) % 2 else None))
        print(trials[-1], file=sys.stderr)
    killed = [trial for trial in trials if trial.killed]
    return {
        "killed": len(killed),
        **{
            state: sum(trial.state == state for trial in killed)
            for state in ("absent", "old", "complete")
        },
        "ended_before_the_kill": len(trials) - len(killed),
        "restarts_that_resumed": sum(trial.resumed > 0 for trial in killed),
        "most_shards_redone": max(trial.redone for trial in killed),
        "shards": sum(name.endswith(".safetensors") for name in expected),
        "whole_run_s": round(whole, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path, help="where to work; must not exist")
    parser.add_argument(
        "--points",
        type=int,
        default=50,
        help="how many runs to kill; one that ends first is no point",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--record", action="store_true", help="add a row to benchmarks/results/robustness.jsonl"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has none of the threads that its parent started
    figures = measure(arguments.source, arguments.folder, arguments.points, arguments.seed)
    print(json.dumps(figures))
    if arguments.record:
        results_log.append("robustness", "kill -9 during a conversion", figures)


if __name__ == "__main__":
    main()
