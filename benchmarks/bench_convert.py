"""Compare the time of a conversion with `cp` plus SHA-256 of the same bytes; append a result row.

Every run starts with the source in the page cache and ends with its output synced to disk. A
conversion syncs by itself; `cp` is followed by `sync` of the copy. The SHA-256 is Python's hashlib,
which a conversion uses too.
"""

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mezzotint
from mezzotint.formats import read_header
from support import results_log


def timed(run: Callable[[], object]) -> float:
    os.sync()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def copy(source: Path, target: Path, sync: bool) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)  # noqa: S607
    if sync:
        subprocess.run(["sync", *target.iterdir()], check=True)  # noqa: S607


def hash_all(folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            hashlib.file_digest(stream, "sha256")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path, help="where to write copies; must not exist")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--to", default="mezzotint")
    arguments = parser.parse_args()
    load = [round(number, 2) for number in os.getloadavg()]
    rows: dict[str, list[float]] = {"cp": [], "cp_sync": [], "sha256": [], "convert": []}

    def time_alone(name: str, run: Callable[[Path], object]) -> None:
        """Time one run that writes into a folder which is removed afterwards."""
        arguments.folder.mkdir(parents=True)
        rows[name].append(timed(lambda: run(arguments.folder / "out")))
        shutil.rmtree(arguments.folder)

    def convert(target: Path) -> None:
        mezzotint.convert(arguments.source, target, to=arguments.to)

    time_alone("convert", convert)  # reads everything once, imports what is needed
    rows["convert"].clear()
    for _ in range(arguments.repeats):
        time_alone("cp", partial(copy, arguments.source, sync=False))
        time_alone("cp_sync", partial(copy, arguments.source, sync=True))
        time_alone("sha256", lambda _target: hash_all(arguments.source))
        time_alone("convert", convert)
    medians = {f"{name}_s": round(statistics.median(times), 3) for name, times in rows.items()}
    figures = {
        "bytes": sum(file.stat().st_size for file in arguments.source.glob("*.safetensors")),
        "repeats": arguments.repeats,
        **medians,
        "times_s": {name: [round(t, 3) for t in times] for name, times in rows.items()},
        "ratio_cp_sha256": round(medians["convert_s"] / (medians["cp_s"] + medians["sha256_s"]), 3),
        "ratio_cp_sync_sha256": round(
            medians["convert_s"] / (medians["cp_sync_s"] + medians["sha256_s"]), 3
        ),
        "largest_tensor_bytes": max(
            info.nbytes for info in read_header(arguments.source).tensors.values()
        ),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "load_before": load,
    }
    results_log.append("convert", f"convert to {arguments.to}", figures)


if __name__ == "__main__":
    main()
