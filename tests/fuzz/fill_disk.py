"""Fill the disk during a conversion, check the output, free the disk, and compare the bytes.

FOLDER must be on a small file system: `mount -t tmpfs -o size=250m tmpfs FOLDER`. Each trial fills
the disk when a certain share of the output is written. The conversion must raise CannotWrite and
leave the old output unchanged. With free space again, a second run must write identical bytes, and
leave no other files.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mezzotint
from fuzz.kill_convert import SHARD_BYTES, leftovers
from mezzotint.errors import CannotWrite
from support import results_log
from support.digest import digest

STEP = 2**12


def fill(ballast: Path) -> None:
    """Take every free byte of the file system."""
    with ballast.open("wb", buffering=0) as stream:
        for step in (2**20, STEP):
            try:
                while True:
                    stream.write(bytes(step))
            except OSError:
                continue


def filling_at(share: float, ballast: Path) -> Callable[[int, int], None]:
    """A progress callback that fills the disk once this share of the bytes is written."""

    def on_progress(done: int, total: int) -> None:
        if done >= share * total and not ballast.exists():
            fill(ballast)

    return on_progress


def trial(source: Path, folder: Path, share: float, expected: dict[str, str]) -> dict[str, Any]:
    """One full disk and one restart, beside an old output."""
    output, ballast = folder / "out", folder / "ballast"
    shutil.copytree(folder / "old", output)
    old = digest(output)
    try:
        mezzotint.convert(
            source,
            output,
            shard_bytes=SHARD_BYTES,
            overwrite=True,
            on_progress=filling_at(share, ballast),
        )
        message = ""
    except CannotWrite as error:
        message = error.message
        assert digest(output) == old, "the old output has changed"
    ballast.unlink()
    if message:
        mezzotint.convert(source, output, shard_bytes=SHARD_BYTES, overwrite=True)
    assert digest(output) == expected, "the restart ended with other bytes"
    assert not leftovers(output), f"files left: {leftovers(output)}"
    shutil.rmtree(output)
    return {"share": share, "message": message}


def small_output(folder: Path) -> None:
    """An earlier output that takes little room: only that may be replaced."""
    mezzotint.convert("demo-fp8", folder)


def too_small(source: Path, folder: Path) -> str:
    """Check the error if the output cannot fit, which is raised before a byte is written."""
    ballast = folder / "ballast"
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(folder).free - size // 2)
    try:
        mezzotint.convert(source, folder / "out", shard_bytes=SHARD_BYTES)
    except CannotWrite as error:
        assert not (folder / "out").exists()
        return error.message
    finally:
        ballast.unlink()
    raise AssertionError("the output fits")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path, help="on a small, separate file system")
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument(
        "--record", action="store_true", help="add a row to benchmarks/results/robustness.jsonl"
    )
    arguments = parser.parse_args()
    early = too_small(arguments.source, arguments.folder)
    small_output(arguments.folder / "old")
    mezzotint.convert(arguments.source, arguments.folder / "out", shard_bytes=SHARD_BYTES)
    expected = digest(arguments.folder / "out")
    shutil.rmtree(arguments.folder / "out")
    shares = [i / (arguments.points - 1) for i in range(arguments.points)]
    trials = [trial(arguments.source, arguments.folder, share, expected) for share in shares]
    stopped = [entry["message"] for entry in trials if entry["message"]]
    figures = {
        "points": len(trials),
        "stopped_with_cannot_write": len(stopped),
        "old_output_intact": len(stopped),
        "restarts_byte_identical": len(stopped),
        "messages": [early, *sorted(set(stopped))[:2]],
        "file_system_bytes": shutil.disk_usage(arguments.folder).total,
    }
    print(json.dumps(figures))
    if arguments.record:
        results_log.append("robustness", "disk full", figures)


if __name__ == "__main__":
    main()
