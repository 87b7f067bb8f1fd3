"""The progress of an output, as the callback of a caller receives it."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Callback that receives the finished bytes and the total bytes."""


def counter(total: int, on_progress: Progress | None) -> Callable[[int], None]:
    """Return a function that adds up the sizes of blocks, and calls `on_progress` each time."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if on_progress is not None:
            on_progress(done, total)

    return count
