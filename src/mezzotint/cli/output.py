"""Console output: tables on stdout, progress on stderr, and no truncation in a pipe."""

import os
import sys
import time
from threading import Event, Thread

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mezzotint.untrusted.escaping import printable

PIPED_WIDTH = 200
INTERVAL, QUIET = 10.0, 1.0
"""Seconds between two progress lines: normally, and at least if the description changes."""


def console() -> Console:
    """Return a console on stdout, as wide as the terminal, or PIPED_WIDTH without one."""
    out = Console()
    return out if out.is_terminal else Console(width=PIPED_WIDTH)


def foreign(text: object) -> Text:
    """Return text from a file or a server for printing, without markup and control characters."""
    return Text(printable(text))


def quiet_libraries() -> None:
    """Silence progress bars and advice of diffusers and transformers. Errors are still shown."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


class Steps:
    """Progress on stderr: a bar in a terminal, lines at intervals elsewhere."""

    def __init__(self, interval: float = INTERVAL) -> None:
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("loading", total=None)
        self.lines = None if console.is_terminal else Lines(interval)

    def __enter__(self) -> "Steps":
        self.bar.start()
        if self.lines:
            self.lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.lines:
            self.lines.stop()

    def say(self, description: str, done: int | None = None, total: int | None = None) -> None:
        """Report the current work and its progress."""
        self.bar.update(self.task, description=description, completed=done, total=total)
        if self.lines:
            self.lines.say(description, done, total)


class Lines(Thread):
    """A thread that prints a line for new work, and one every `interval` seconds."""

    def __init__(self, interval: float) -> None:
        super().__init__(daemon=True)
        self.interval, self.started = interval, time.monotonic()
        self.ended, self.state, self.printed = Event(), ("loading", 0, 0), float("-inf")

    def say(self, description: str, done: int | None, total: int | None) -> None:
        """Set the current work. Print it at once if it is new."""
        previous, old_done, old_total = self.state
        self.state = (
            description,
            old_done if done is None else done,
            old_total if total is None else total,
        )
        if description != previous and time.monotonic() - self.printed >= QUIET:
            self.show()

    def run(self) -> None:
        """Print lines until `stop` is called."""
        self.show()
        while not self.ended.wait(self.interval):
            self.show()

    def stop(self) -> None:
        """End the thread."""
        self.ended.set()
        self.join()

    def show(self) -> None:
        """Print a line such as "12 s: demo-fp8, 3 of 24"."""
        self.printed = time.monotonic()
        description, done, total = self.state
        count = f", {done} of {total}" if total else ""
        seconds = self.printed - self.started
        print(f"{seconds:.0f} s: {printable(description)}{count}", file=sys.stderr, flush=True)
