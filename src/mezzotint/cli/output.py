"""How commands print: tables on stdout, progress on stderr, nothing cut off where there is no terminal."""

import os
import sys
import time
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from mezzotint.escaping import printable

PIPED_WIDTH = 200
INTERVAL, QUIET = 10.0, 1.0
"""Seconds between two lines of progress, and at least between two of things that are begun."""


def console() -> Console:
    """Stdout, as wide as the terminal, or wide enough for whole names where there is none."""
    out = Console()
    return out if out.is_terminal else Console(width=PIPED_WIDTH)


def foreign(text: object) -> Text:
    """Return text that is from a file or a server as a cell or line: no markup in it, no control characters."""
    return Text(printable(text))


def quiet_libraries() -> None:
    """Keep the chatter of diffusers and transformers (bars, advice) out of our messages; errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


class Steps:
    """What a command says of its progress on stderr: a bar on a terminal, lines at intervals anywhere else."""

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

    def say(self, what: str, done: int | None = None, total: int | None = None) -> None:
        """What is being done, and how much of it is."""
        self.bar.update(self.task, description=what, completed=done, total=total)
        if self.lines:
            self.lines.say(what, done, total)


class Lines(Thread):
    """Prints at once what is begun, and how far it is every `interval` seconds, also while nothing is reported."""

    def __init__(self, interval: float) -> None:
        super().__init__(daemon=True)
        self.interval, self.began = interval, time.monotonic()
        self.ended, self.state, self.printed = Event(), ("loading", 0, 0), float("-inf")

    def say(self, what: str, done: int | None, total: int | None) -> None:
        begun, had, of = self.state
        self.state = (what, had if done is None else done, of if total is None else total)
        if what != begun and time.monotonic() - self.printed >= QUIET:
            self.show()

    def run(self) -> None:
        self.show()
        while not self.ended.wait(self.interval):
            self.show()

    def stop(self) -> None:
        self.ended.set()
        self.join()

    def show(self) -> None:
        """Print a line such as "12 s: demo-fp8, 3 of 24"."""
        self.printed = time.monotonic()
        what, done, total = self.state
        count = f", {done} of {total}" if total else ""
        print(f"{self.printed - self.began:.0f} s: {printable(what)}{count}", file=sys.stderr, flush=True)
