"""Time `inspect` and planning of full-size checkpoints: sparse files with real headers.

PYTHONPATH=src:tests python benchmarks/bench_headers.py
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from mezzotint.checkpoint import Checkpoint, inspect
from mezzotint.families.building import build_meta_model
from mezzotint.loading import plan
from support import results_log
from support import sparse_checkpoints as sparse
from support.header_fixtures import MODELS, header_of, read_fixture

DATA = Path(sparse.__file__).parent / "data"


def seconds(measure: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Return the seconds of a first call, with its imports, and the median of further calls."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        measure()
        times.append(time.perf_counter() - started)
    return {"first": round(times[0], 3), "median": round(median(times[1:]), 3)}


def inspected(repeats: int) -> dict[str, Any]:
    """{format: its size and the time}"""
    rows = {}
    for name, make in sparse.FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = make(Path(folder) / "full", DATA)
            stored = inspect(path).stored_bytes
            rows[name] = {
                "GB": round(stored / 1e9, 1),
                **seconds(lambda path=path: inspect(path), repeats),
            }
    return rows


def planned(repeats: int) -> dict[str, Any]:
    """{model, form: the time from its header to its plan}; the empty model is there already."""
    rows = {}
    for model in MODELS:
        fixture = read_fixture(model)
        empty = build_meta_model(fixture["config"]["_class_name"], fixture["config"])
        for form in ("diffusers", "original"):
            shapes = sparse.full_size(model, form)
            header = header_of(
                {name: tuple(tensor.shape) for name, tensor in shapes.items()}, fixture["config"]
            )
            rows[f"{model}, {form}"] = seconds(
                lambda header=header, empty=empty: plan(Checkpoint.of(header), empty), repeats
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    results_log.append(
        "headers", "full-size checkpoints inspected", {"unit": "s", "formats": inspected(repeats)}
    )
    results_log.append(
        "headers", "full-size models planned", {"unit": "s", "models": planned(repeats)}
    )


if __name__ == "__main__":
    main()
