"""Read many hostile files in one process, under limits of memory and time.

Each file is refused by one of Mezzotint's errors, or read; any other error is a failure. The kernel
enforces the limit of memory, so that a large allocation fails wherever it is made.
"""

import argparse
import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support import results_log

MEMORY = 300 * 2**20
"""Bytes that reading hostile files may add to a process."""
SECONDS = 1.0
"""Processor time that reading one file may take."""
Mutate = Callable[[random.Random], bytes]
Accepts = Callable[[Path], bool]
"""Whether Mezzotint reads a file; raises AssertionError if it reads what it must refuse."""
Figures = dict[str, float | int]


@contextmanager
def bounded_memory() -> Iterator[Callable[[], int]]:
    """Limit what this process may add to its memory to MEMORY; yield a function that measures it.

    The peak of resident memory is compared too, because an allocation may reuse freed space.
    """
    before, limits = _peak(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, limits[1]))
    try:
        yield lambda: _peak() - before
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert _peak() - before < MEMORY, f"memory grew by {_peak() - before:,} bytes"


def _peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def fuzz(file: Path, number: int, seed: int, mutate: Mutate, accepts: Accepts) -> Figures:
    """Try `number` mutated files; raises AssertionError for the first that breaks a promise."""
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    slowest = 0.0
    _try(file, mutate(chance), accepts)  # imports what reading needs
    with bounded_memory() as grown:
        for _ in range(number):
            accepted, seconds = _try(file, mutate(chance), accepts)
            counts["accepted" if accepted else "refused"] += 1
            slowest = max(slowest, seconds)
        figures: Figures = {"headers": number, **counts, "slowest_s": round(slowest, 4)}
        return figures | {"memory_grown_bytes": grown()}


def _try(file: Path, content: bytes, accepts: Accepts) -> tuple[bool, float]:
    """Return whether a file is accepted, and the processor time that took."""
    file.write_bytes(content)
    started = time.process_time()
    try:
        accepted = accepts(file)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}: {content[:400]!r}") from error
    seconds = time.process_time() - started
    assert seconds < SECONDS, f"took {seconds:.2f} s: {content[:400]!r}"
    return accepted, seconds


def run_from_command_line(
    description: str | None, what: str, mutate: Mutate, accepts: Accepts
) -> None:
    """Parse the arguments, try the files, and print the figures.

    what   title of the row that --record adds
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=Path("fuzz.bin"), help="overwritten each time")
    parser.add_argument(
        "--record", action="store_true", help="add a row to benchmarks/results/robustness.jsonl"
    )
    arguments = parser.parse_args()
    started = time.process_time()
    figures = fuzz(arguments.file, arguments.number, arguments.seed, mutate, accepts)
    figures["processor_seconds"] = round(time.process_time() - started, 1)
    arguments.file.unlink()
    print(json.dumps(figures))
    if arguments.record:
        results_log.append("robustness", what, figures)
