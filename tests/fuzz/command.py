"""The command line of the fuzzers that change copies of files."""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import results_log

Fuzz = Callable[[list[Path], Path, int, int], dict[str, Any]]
"""Take sources, a folder to write to, the number of changed files and a seed; return figures."""


def run_from_command_line(description: str | None, title: str, fuzz: Fuzz, number: int) -> None:
    """Parse the arguments, run the fuzzer in a new folder, and print its figures.

    The folder is removed, unless the fuzzer raises an error about a file in it.

    title    of the row that --record adds
    number   of changed files by default
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources", type=Path, nargs="+", help="safetensors files, or folders of small pipelines"
    )
    parser.add_argument("--number", type=int, default=number)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where to write; failing files stay there"
    )
    parser.add_argument(
        "--record", action="store_true", help="add a row to benchmarks/results/robustness.jsonl"
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    started = time.monotonic()
    figures = fuzz(arguments.sources, arguments.folder, arguments.number, arguments.seed)
    figures["seconds"] = round(time.monotonic() - started, 1)
    shutil.rmtree(arguments.folder)
    print(json.dumps(figures))
    if arguments.record:
        results_log.append("robustness", title, figures)
